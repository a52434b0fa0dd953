// Normalise + activate, forward and backward. Both are bound by memory: forward reads x twice and
// writes y; backward reads x and dy twice and writes dx. The activation mask is recomputed.
//
// channels_last: blocks of rows, channels across the lanes.
// contiguous: a few channels of one group at a time, so the second reading comes from the cache.

#include "cpu/norm_act.h"

#include <algorithm>
#include <cmath>

namespace pygan::PYGAN_ISA_NS {
namespace {

template <Activation A>
Vec activate(Vec z, Vec slope) {
  if constexpr (A == Activation::relu) return max(Vec(0.0f), z);
  if constexpr (A == Activation::leaky_relu) return if_positive(z, z, z * slope);
  if constexpr (A == Activation::tanh) return tanh(z);
  if constexpr (A == Activation::sigmoid) return sigmoid(z);
  return z;
}

void fill_coefficients(const NormActForward& args) {
  const int64_t C = args.shape.channels;
  for (int64_t g = 0; g < args.shape.groups; ++g) {
    std::copy_n(args.mean + g * C, C, args.coefficients + g * 3 * C);
  }
  fill_maps(args, args.coefficients + C, 3 * C);
}

template <class Args>
Affine affine_of_channel(const Args& args, int64_t g, int64_t c) {
  const int64_t at = g * args.shape.channels + c;
  const float scale = args.invstd[at] * (args.weight ? args.weight[c] : 1.0f);
  return {Vec(args.mean[at]), Vec(scale), Vec(args.bias ? args.bias[c] : 0.0f),
          Vec(args.shape.negative_slope)};
}

template <Activation A>
Vec forward_value(Vec x, const Affine& map) {
  return activate<A>(fma(x - map.centre, map.scale, map.shift), map.slope);
}

// dx = scale * dz - offset - (x - mean) * tilt
template <Activation A>
Vec gradient_of_x(Vec x, Vec dy, const Affine& map, Vec offset, Vec tilt) {
  const Vec d = x - map.centre;
  return map.scale * gradient_of_z<A>(d, dy, map) - fma(d, tilt, offset);
}

// Sums about a shift -> mean and sum of squared deviations of n values. The shift is the mean of a
// sample of them, so the subtraction costs no accuracy.
void from_shifted(double n, double shift, double& first, double& second) {
  const double mean = first / n;
  second = std::max(0.0, second - first * mean);
  first = shift + mean;
}

// Running statistics follow every group in order. moments(g, c, mean, sum of squared deviations).
template <class Moments>
void finish_statistics(const NormActForward& args, double count, const Moments& moments) {
  const auto follow = [&](float* running, int64_t c, double value) {
    if (!running) return;
    running[c] = static_cast<float>((1.0 - args.momentum) * running[c] + args.momentum * value);
  };
  for (int64_t g = 0; g < args.shape.groups; ++g) {
    for (int64_t c = 0; c < args.shape.channels; ++c) {
      double mean, square;
      moments(g, c, mean, square);
      const int64_t at = g * args.shape.channels + c;
      args.mean[at] = static_cast<float>(mean);
      args.invstd[at] = static_cast<float>(1.0 / std::sqrt(square / count + args.eps));
      follow(args.running_mean, c, mean);
      follow(args.running_var, c, square / (count - 1.0));
    }
  }
}

// The sums of a channel -> offset and tilt of its dx.
void set_terms(const NormActBackward& args, double count, int64_t g, int64_t c, double sum_dz,
               double sum_dzx, float* offset, float* tilt) {
  const int64_t at = g * args.shape.channels + c;
  const double invstd = args.invstd[at];
  const double scale = invstd * (args.weight ? args.weight[c] : 1.0f);
  const double share = args.training ? scale / count : 0.0;
  offset[at] = static_cast<float>(share * sum_dz);
  tilt[at] = static_cast<float>(share * sum_dzx * invstd * invstd);
}

// The parameters' gradients from the sums of every group: of dz at sums(g, c), of dz * (x - mean)
// `apart` behind.
template <class Sums>
void finish_parameters(const NormActBackward& args, int64_t apart, const Sums& sums) {
  const NormActShape& s = args.shape;
  if (!args.dweight && !args.dbias) return;
  for (int64_t c = 0; c < s.channels; ++c) {
    double total_dz = 0.0, total_dzxhat = 0.0;
    for (int64_t g = 0; g < s.groups; ++g) {
      const double* of_channel = sums(g, c);
      total_dz += of_channel[0];
      total_dzxhat += of_channel[apart] * args.invstd[g * s.channels + c];
    }
    if (args.dbias) args.dbias[c] = static_cast<float>(total_dz);
    if (args.dweight) args.dweight[c] = static_cast<float>(total_dzxhat);
  }
}

// channels_last

// Mean of a few rows spread over each group: a shift near the mean of all.
template <class T>
void sample_means(const NormActShape& s, const T* x, float* mean) {
  const int64_t rows = s.batch / s.groups * s.spatial, C = s.channels;
  const int64_t count = std::min<int64_t>(16, rows);
  for (int64_t g = 0; g < s.groups; ++g) {
    for_each_vector(C, [&](int64_t c, auto lanes) {
      Vec total(0.0f);
      for (int64_t i = 0; i < count; ++i) {
        total = total + lanes.get(x + (g * rows + i * rows / count) * C + c);
      }
      lanes.put(mean + g * C + c, total * Vec(1.0f / static_cast<float>(count)));
    });
  }
}

template <class T>
void forward_channels_last(const NormActForward& args) {
  const NormActShape& s = args.shape;
  const T* x = static_cast<const T*>(args.x);
  T* y = static_cast<T*>(args.y);
  const int64_t C = s.channels;
  const RowBlocks blocks = row_blocks(s);
  if (args.training) {
    sample_means(s, x, args.mean);
    for_each_block(s, [&](int64_t row, int64_t rows, int64_t block, int64_t g) {
      const float* shifts = args.mean + g * C;
      sum_rows<2>(
          row, rows, C, args.scratch + block * block_scratch(s, 2),
          [&](int64_t c, auto lanes) { return lanes.get(shifts + c); },
          [&](Place place, auto lanes, Vec shift, Vec* sums) {
            const Vec d = lanes.read(x, place) - shift;
            sums[0] = sums[0] + d;
            sums[1] = fma(d, d, sums[1]);
          });
    });
    add_blocks<2>(s, args.scratch);
    const double count = static_cast<double>(blocks.rows);
    finish_statistics(args, count, [&](int64_t g, int64_t c, double& mean, double& square) {
      const double* sums = args.scratch + g * blocks.count * block_scratch(s, 2) + c;
      mean = sums[0];
      square = sums[C];
      from_shifted(count, args.mean[g * C + c], mean, square);
    });
  }
  if (args.coefficients) fill_coefficients(args);
  if (!y) return;
  float* maps = behind_sums<2>(s, args.scratch);
  fill_maps(args, maps, 2 * C);
  const Vec slope(s.negative_slope);
  with_activation(s.activation, [&](auto chosen) {
    for_each_block(s, [&](int64_t row, int64_t rows, int64_t, int64_t g) {
      const ChannelMaps map_of{args.mean + g * C, maps + 2 * g * C, C, slope};
      for_each_strip(row, rows, C, [&](auto strip, auto lanes) {
        const Affine map = map_of(strip.channel, lanes);
        strip.each([&](Place place) {
          lanes.write(y, place, forward_value<decltype(chosen)::value>(lanes.read(x, place), map));
        });
      });
    });
  });
}

template <class T>
void backward_channels_last(const NormActBackward& args) {
  const NormActShape& s = args.shape;
  const T* x = static_cast<const T*>(args.x);
  const T* dy = static_cast<const T*>(args.dy);
  T* dx = static_cast<T*>(args.dx);
  const int64_t C = s.channels;
  const RowBlocks blocks = row_blocks(s);
  float* maps = behind_sums<2>(s, args.scratch);
  float* offset = maps + s.groups * 2 * C;
  float* tilt = offset + s.groups * C;
  fill_maps(args, maps, 2 * C);
  const Vec slope(s.negative_slope);
  with_activation(s.activation, [&](auto chosen) {
    constexpr Activation A = decltype(chosen)::value;
    for_each_block(s, [&](int64_t row, int64_t rows, int64_t block, int64_t g) {
      sum_rows<2>(row, rows, C, args.scratch + block * block_scratch(s, 2),
                  ChannelMaps{args.mean + g * C, maps + 2 * g * C, C, slope},
                  [&](Place place, auto lanes, const Affine& map, Vec* sums) {
                    const Vec d = lanes.read(x, place) - map.centre;
                    const Vec dz = gradient_of_z<A>(d, lanes.read(dy, place), map);
                    sums[0] = sums[0] + dz;
                    sums[1] = fma(dz, d, sums[1]);
                  });
    });
    add_blocks<2>(s, args.scratch);
    const auto sums = [&](int64_t g, int64_t c) {
      return args.scratch + g * blocks.count * block_scratch(s, 2) + c;
    };
    finish_parameters(args, C, sums);
    if (!dx) return;
    for (int64_t g = 0; g < s.groups; ++g) {
      for (int64_t c = 0; c < C; ++c) {
        const double* of_channel = sums(g, c);
        set_terms(args, static_cast<double>(blocks.rows), g, c, of_channel[0], of_channel[C],
                  offset, tilt);
      }
    }
    for_each_block(s, [&](int64_t row, int64_t rows, int64_t, int64_t g) {
      const ChannelMaps map_of{args.mean + g * C, maps + 2 * g * C, C, slope};
      for_each_strip(row, rows, C, [&](auto strip, auto lanes) {
        const Affine map = map_of(strip.channel, lanes);
        const int64_t at = g * C + strip.channel;
        const Vec constant = lanes.get(offset + at), linear = lanes.get(tilt + at);
        strip.each([&](Place place) {
          const Vec value = lanes.read(x, place), dvalue = lanes.read(dy, place);
          lanes.write(dx, place, gradient_of_x<A>(value, dvalue, map, constant, linear));
        });
      });
    });
  });
}

// contiguous

// Channels `first` to before `last` of a group, which a thread goes through together: one short
// plane alone is too little to read at a place.
struct Tile {
  int64_t group, first, last;
};

template <class Body>
void for_each_tile(const NormActShape& s, const Body& body) {
  const int64_t fair = ceil_div(s.channels, team(s)), most = kTileValues / s.spatial;
  const int64_t size = std::max<int64_t>(1, std::min(fair, most));
  const int64_t count = ceil_div(s.channels, size);
  parallel_for(team(s), s.groups * count, [&](int64_t item) {
    const int64_t first = item % count * size;
    body(Tile{item / count, first, std::min(first + size, s.channels)});
  });
}

// Whole planes of one channel, or a piece of one plane.
struct Chunk {
  int64_t channel, first, planes, stride, length;
  int64_t ahead;  // from a value to one that is read soon
  template <class T, class Body>
  void each(const T*, const Body& body) const {
    const int64_t asked = ahead - kAhead / static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < planes; ++i) {
      for_each_vector(length, [&](int64_t j, auto lanes) {
        const int64_t at = first + i * stride + j;
        body(Place{at, at + asked}, lanes);
      });
    }
  }
};

int64_t planes_together(const NormActShape& s) {
  return std::max<int64_t>(1, kChunkValues / s.spatial);
}

// The chunk of a group's channel that starts with plane n at value j.
Chunk chunk_at(const NormActShape& s, int64_t group, int64_t channel, int64_t n, int64_t j) {
  const int64_t planes = s.batch / s.groups, stride = s.channels * s.spatial;
  const int64_t first = (group * planes + n) * stride + channel * s.spatial + j;
  const int64_t most = planes_together(s), length = std::min(kChunkValues, s.spatial - j);
  const int64_t ahead = s.spatial < kChunkValues ? most * stride : 2 * kChunkValues;
  return {channel, first, std::min(most, planes - n), stride, length, ahead};
}

// Chunks of the same planes follow each other through the tile's channels, as in memory.
template <class Body>
void for_each_chunk(const NormActShape& s, const Tile& tile, const Body& body) {
  for (int64_t n = 0; n < s.batch / s.groups; n += planes_together(s)) {
    for (int64_t c = tile.first; c < tile.last; ++c) {
      for (int64_t j = 0; j < s.spatial; j += kChunkValues) {
        body(chunk_at(s, tile.group, c, n, j));
      }
    }
  }
}

// Two sums over each channel of a tile, in float64, which those of chunks in float32 join:
// sums[channel of the group][2]. of_channel(channel) is what a chunk needs, and
// add(place, lanes, that, both) adds to its two sums.
template <class T, class OfChannel, class Add>
void sum_tile(const NormActShape& s, const Tile& tile, const T* x, double* sums,
              const OfChannel& of_channel, const Add& add) {
  std::fill(sums + 2 * tile.first, sums + 2 * tile.last, 0.0);
  for_each_chunk(s, tile, [&](const Chunk& chunk) {
    const auto channel = of_channel(chunk.channel);
    Vec both[2] = {Vec(0.0f), Vec(0.0f)};
    chunk.each(x, [&](Place place, auto lanes) { add(place, lanes, channel, both); });
    for (int i = 0; i < 2; ++i) sums[2 * chunk.channel + i] += sum(both[i]);
  });
}

template <class T>
void tile_statistics(const NormActForward& args, const Tile& tile, double count, double* sums) {
  const NormActShape& s = args.shape;
  const T* x = static_cast<const T*>(args.x);
  float* shifts = args.mean + tile.group * s.channels;
  float* invstd = args.invstd + tile.group * s.channels;
  for (int64_t c = tile.first; c < tile.last; ++c) {
    const Chunk chunk = chunk_at(s, tile.group, c, 0, 0);
    Vec total(0.0f);
    chunk.each(x, [&](Place place, auto lanes) { total = total + lanes.get(x + place.at); });
    shifts[c] = sum(total) / static_cast<float>(chunk.planes * chunk.length);
  }
  sum_tile(
      s, tile, x, sums, [&](int64_t c) { return Vec(shifts[c]); },
      [&](Place place, auto lanes, Vec shift, Vec* both) {
        const Vec d = keep(lanes.read(x, place) - shift, lanes.count());
        both[0] = both[0] + d;
        both[1] = fma(d, d, both[1]);
      });
  for (int64_t c = tile.first; c < tile.last; ++c) {
    double &mean = sums[2 * c], &square = sums[2 * c + 1];
    from_shifted(count, shifts[c], mean, square);
    shifts[c] = static_cast<float>(mean);
    invstd[c] = static_cast<float>(1.0 / std::sqrt(square / count + args.eps));
  }
}

template <class T>
void forward_contiguous(const NormActForward& args) {
  const NormActShape& s = args.shape;
  const T* x = static_cast<const T*>(args.x);
  T* y = static_cast<T*>(args.y);
  const double count = static_cast<double>(s.batch / s.groups * s.spatial);
  with_activation(s.activation, [&](auto chosen) {
    for_each_tile(s, [&](const Tile& tile) {
      if (args.training) {
        tile_statistics<T>(args, tile, count, args.scratch + tile.group * s.channels * 2);
      }
      if (!y) return;
      for_each_chunk(s, tile, [&](const Chunk& chunk) {
        const Affine map = affine_of_channel(args, tile.group, chunk.channel);
        chunk.each(x, [&](Place place, auto lanes) {
          const Vec value = lanes.get(x + place.at);
          lanes.put(y + place.at, forward_value<decltype(chosen)::value>(value, map));
        });
      });
    });
  });
  if (args.training) {
    finish_statistics(args, count, [&](int64_t g, int64_t c, double& mean, double& square) {
      mean = args.scratch[(g * s.channels + c) * 2];
      square = args.scratch[(g * s.channels + c) * 2 + 1];
    });
  }
  if (args.coefficients) fill_coefficients(args);
}

template <class T>
void backward_contiguous(const NormActBackward& args) {
  const NormActShape& s = args.shape;
  const T* x = static_cast<const T*>(args.x);
  const T* dy = static_cast<const T*>(args.dy);
  T* dx = static_cast<T*>(args.dx);
  const double count = static_cast<double>(s.batch / s.groups * s.spatial);
  float* offset = reinterpret_cast<float*>(args.scratch + s.groups * s.channels * 2);
  float* tilt = offset + s.groups * s.channels;
  with_activation(s.activation, [&](auto chosen) {
    constexpr Activation A = decltype(chosen)::value;
    for_each_tile(s, [&](const Tile& tile) {
      const int64_t group = tile.group * s.channels;
      double* sums = args.scratch + 2 * group;
      const auto map_of = [&](int64_t c) { return affine_of_channel(args, tile.group, c); };
      sum_tile(s, tile, x, sums, map_of,
               [&](Place place, auto lanes, const Affine& map, Vec* both) {
                 const Vec d = lanes.read(x, place) - map.centre;
                 const Vec dz = gradient_of_z<A>(d, lanes.read(dy, place), map);
                 both[0] = both[0] + dz;
                 both[1] = fma(dz, d, both[1]);
               });
      if (!dx) return;
      for (int64_t c = tile.first; c < tile.last; ++c) {
        set_terms(args, count, tile.group, c, sums[2 * c], sums[2 * c + 1], offset, tilt);
      }
      for_each_chunk(s, tile, [&](const Chunk& chunk) {
        const Affine map = map_of(chunk.channel);
        const Vec constant(offset[group + chunk.channel]), linear(tilt[group + chunk.channel]);
        chunk.each(x, [&](Place place, auto lanes) {
          const Vec value = lanes.get(x + place.at), dvalue = lanes.get(dy + place.at);
          lanes.put(dx + place.at, gradient_of_x<A>(value, dvalue, map, constant, linear));
        });
      });
    });
  });
  finish_parameters(args, 1,
                    [&](int64_t g, int64_t c) { return args.scratch + (g * s.channels + c) * 2; });
}

}  // namespace

void norm_act_forward(const NormActForward& args) {
  const bool last = args.shape.layout == Layout::channels_last;
  if (args.shape.dtype == DType::f32) {
    last ? forward_channels_last<float>(args) : forward_contiguous<float>(args);
  } else {
    last ? forward_channels_last<bfloat16>(args) : forward_contiguous<bfloat16>(args);
  }
}

void norm_act_backward(const NormActBackward& args) {
  const bool last = args.shape.layout == Layout::channels_last;
  if (args.shape.dtype == DType::f32) {
    last ? backward_channels_last<float>(args) : backward_contiguous<float>(args);
  } else {
    last ? backward_channels_last<bfloat16>(args) : backward_contiguous<bfloat16>(args);
  }
}

}  // namespace pygan::PYGAN_ISA_NS
