// Normalise + activate, forward and backward. Both are bound by memory: forward reads x twice and
// writes y; backward reads x and dy twice and writes dx. The activation mask is recomputed.
//
// channels_last: blocks of rows, channels across the lanes.
// contiguous: one channel of one group at a time, so the second reading comes from the cache.

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

// Sums of every group -> offset and tilt of its dx, and the parameters' gradients.
// sums(g, c, sum of dz, sum of dz * (x - mean)).
template <class Sums>
void finish_gradients(const NormActBackward& args, double count, float* offset, float* tilt,
                      const Sums& sums) {
  const NormActShape& s = args.shape;
  for (int64_t c = 0; c < s.channels; ++c) {
    double total_dz = 0.0, total_dzxhat = 0.0;
    for (int64_t g = 0; g < s.groups; ++g) {
      double sum_dz, sum_dzx;
      sums(g, c, sum_dz, sum_dzx);
      const int64_t at = g * s.channels + c;
      const double invstd = args.invstd[at];
      const double scale = invstd * (args.weight ? args.weight[c] : 1.0f);
      const double share = args.training ? scale / count : 0.0;
      offset[at] = static_cast<float>(share * sum_dz);
      tilt[at] = static_cast<float>(share * sum_dzx * invstd * invstd);
      total_dz += sum_dz;
      total_dzxhat += sum_dzx * invstd;
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
    finish_gradients(args, static_cast<double>(blocks.rows), offset, tilt,
                     [&](int64_t g, int64_t c, double& sum_dz, double& sum_dzx) {
                       const double* sums =
                           args.scratch + g * blocks.count * block_scratch(s, 2) + c;
                       sum_dz = sums[0];
                       sum_dzx = sums[C];
                     });
    if (!dx) return;
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

// The chunks of one channel: runs of whole planes, or pieces of one plane.
template <class Body>
void for_each_chunk(int64_t planes, int64_t spatial, const Body& body) {
  if (spatial <= kChunkValues) {
    const int64_t step = kChunkValues / std::max<int64_t>(spatial, 1);
    for (int64_t n = 0; n < planes; n += step) body(n, std::min(step, planes - n), 0, spatial);
  } else {
    for (int64_t n = 0; n < planes; ++n) {
      for (int64_t s = 0; s < spatial; s += kChunkValues) {
        body(n, 1, s, std::min(kChunkValues, spatial - s));
      }
    }
  }
}

template <class T>
void channel_moments(const T* x, int64_t planes, int64_t spatial, int64_t stride, double& mean,
                     double& square) {
  mean = square = 0.0;
  float shift = 0.0f;
  bool started = false;
  for_each_chunk(planes, spatial, [&](int64_t n, int64_t n_planes, int64_t s, int64_t length) {
    const auto each = [&](auto&& use) {
      for (int64_t i = n; i < n + n_planes; ++i) {
        for_each_vector(length, [&](int64_t j, auto lanes) {
          use(lanes.get(x + i * stride + s + j), lanes.count());
        });
      }
    };
    if (!started) {
      Vec total(0.0f);
      each([&](Vec value, int) { total = total + value; });
      shift = sum(total) / static_cast<float>(n_planes * length);
      started = true;
    }
    Vec first(0.0f), second(0.0f);
    each([&](Vec value, int count) {
      const Vec d = keep(value - Vec(shift), count);
      first = first + d;
      second = fma(d, d, second);
    });
    mean += sum(first);
    square += sum(second);
  });
  from_shifted(static_cast<double>(planes * spatial), shift, mean, square);
}

template <Activation A, class T>
void channel_sums(const T* x, const T* dy, int64_t planes, int64_t spatial, int64_t stride,
                  const Affine& map, double& sum_dz, double& sum_dzx) {
  sum_dz = sum_dzx = 0.0;
  for_each_chunk(planes, spatial, [&](int64_t n, int64_t n_planes, int64_t s, int64_t length) {
    Vec a(0.0f), b(0.0f);
    for (int64_t i = n; i < n + n_planes; ++i) {
      for_each_vector(length, [&](int64_t j, auto lanes) {
        const int64_t at = i * stride + s + j;
        const Vec d = lanes.read(x, {at, at}) - map.centre;
        const Vec dz = gradient_of_z<A>(d, lanes.read(dy, {at, at}), map);
        a = a + dz;
        b = fma(dz, d, b);
      });
    }
    sum_dz += sum(a);
    sum_dzx += sum(b);
  });
}

// One channel of one group at a time: body(first value, planes, group, channel).
template <class Body>
void for_each_channel(const NormActShape& s, const Body& body) {
  const int64_t planes = s.batch / s.groups;
  parallel_for(team(s), s.groups * s.channels, [&](int64_t item) {
    const int64_t g = item / s.channels, c = item % s.channels;
    body((g * planes * s.channels + c) * s.spatial, planes, g, c);
  });
}

template <class T>
void forward_contiguous(const NormActForward& args) {
  const NormActShape& s = args.shape;
  const T* x = static_cast<const T*>(args.x);
  T* y = static_cast<T*>(args.y);
  const int64_t stride = s.channels * s.spatial;
  const double count = static_cast<double>(s.batch / s.groups * s.spatial);
  with_activation(s.activation, [&](auto chosen) {
    for_each_channel(s, [&](int64_t at, int64_t planes, int64_t g, int64_t c) {
      if (args.training) {
        double* moments = args.scratch + (g * s.channels + c) * 2;
        channel_moments(x + at, planes, s.spatial, stride, moments[0], moments[1]);
        args.mean[g * s.channels + c] = static_cast<float>(moments[0]);
        args.invstd[g * s.channels + c] =
            static_cast<float>(1.0 / std::sqrt(moments[1] / count + args.eps));
      }
      const Affine map = affine_of_channel(args, g, c);
      for (int64_t n = 0; y && n < planes; ++n) {
        for_each_vector(s.spatial, [&](int64_t j, auto lanes) {
          const int64_t here = at + n * stride + j;
          lanes.put(y + here, forward_value<decltype(chosen)::value>(lanes.get(x + here), map));
        });
      }
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
  const int64_t stride = s.channels * s.spatial;
  const double count = static_cast<double>(s.batch / s.groups * s.spatial);
  float* offset = reinterpret_cast<float*>(args.scratch + s.groups * s.channels * 2);
  float* tilt = offset + s.groups * s.channels;
  with_activation(s.activation, [&](auto chosen) {
    constexpr Activation A = decltype(chosen)::value;
    for_each_channel(s, [&](int64_t at, int64_t planes, int64_t g, int64_t c) {
      const Affine map = affine_of_channel(args, g, c);
      const int64_t gc = g * s.channels + c;
      double* sums = args.scratch + gc * 2;
      channel_sums<A>(x + at, dy + at, planes, s.spatial, stride, map, sums[0], sums[1]);
      if (!dx) return;
      const double invstd = args.invstd[gc];
      const double share =
          args.training ? invstd * (args.weight ? args.weight[c] : 1.0f) / count : 0.0;
      const Vec constant(static_cast<float>(share * sums[0]));
      const Vec linear(static_cast<float>(share * sums[1] * invstd * invstd));
      for (int64_t n = 0; n < planes; ++n) {
        for_each_vector(s.spatial, [&](int64_t j, auto lanes) {
          const int64_t here = at + n * stride + j;
          lanes.put(dx + here, gradient_of_x<A>(lanes.get(x + here), lanes.get(dy + here), map,
                                                constant, linear));
        });
      }
    });
  });
  finish_gradients(args, count, offset, tilt,
                   [&](int64_t g, int64_t c, double& sum_dz, double& sum_dzx) {
                     sum_dz = args.scratch[(g * s.channels + c) * 2];
                     sum_dzx = args.scratch[(g * s.channels + c) * 2 + 1];
                   });
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
