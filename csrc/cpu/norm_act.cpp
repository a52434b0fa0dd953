// Normalise + activate, forward and backward. Both are bound by memory: forward reads x twice and
// writes y; backward reads x and dy twice and writes dx. The activation mask is recomputed.
//
// channels_last: blocks of rows, channels across the lanes, a strip of channels in registers.
// contiguous: one channel of one group at a time, so the second reading comes from the cache.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pygan::PYGAN_ISA_NS {
namespace {

constexpr int kStrip = Vec::width == 16 ? 4 : 2;  // vectors of channels held in registers
constexpr int kLanes = kStrip * Vec::width;
// A lane sums so many values in float32 before they join float64 sums.
constexpr int64_t kChunkRows = 16;
constexpr int64_t kChunkValues = kChunkRows * Vec::width;
constexpr int64_t kSerialValues = 1 << 14;  // below this a second thread costs more than it gives

// Strips of a row of channels: K whole vectors, or the first `count` lanes of one.
template <int K>
struct Whole {
  static constexpr int vectors = K;
  static constexpr int count() { return K * Vec::width; }
  template <class T>
  Vec get(const T* p, int k) const {
    return load(p + k * Vec::width);
  }
  template <class T>
  void put(T* p, int k, Vec value) const {
    store(p + k * Vec::width, value);
  }
};
struct Part {
  static constexpr int vectors = 1;
  int lanes;
  int count() const { return lanes; }
  template <class T>
  Vec get(const T* p, int) const {
    return load(p, lanes);
  }
  template <class T>
  void put(T* p, int, Vec value) const {
    store(p, value, lanes);
  }
};

template <class Body>
void for_each_strip(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) body(c, Whole<kStrip>{});
  for (; c + Vec::width <= channels; c += Vec::width) body(c, Whole<1>{});
  if (c < channels) body(c, Part{static_cast<int>(channels - c)});
}

// The chunks of one contiguous channel: runs of whole planes, or pieces of one plane.
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

template <class Body>
void for_each_vector(int64_t length, const Body& body) {
  int64_t i = 0;
  for (; i + Vec::width <= length; i += Vec::width) body(i, Whole<1>{});
  if (i < length) body(i, Part{static_cast<int>(length - i)});
}

template <Activation A>
Vec activate(Vec z, Vec slope) {
  if constexpr (A == Activation::relu) return max(Vec(0.0f), z);
  if constexpr (A == Activation::leaky_relu) return if_positive(z, z, z * slope);
  if constexpr (A == Activation::tanh) return tanh(z);
  if constexpr (A == Activation::sigmoid) return sigmoid(z);
  return z;
}

template <Activation A>
Vec through_activation(Vec dy, Vec z, Vec slope) {
  if constexpr (A == Activation::relu) return if_positive(z, dy, Vec(0.0f));
  if constexpr (A == Activation::leaky_relu) return if_positive(z, dy, dy * slope);
  if constexpr (A == Activation::tanh) return dy * tanh_slope(z);
  if constexpr (A == Activation::sigmoid) return dy * sigmoid_slope(z);
  return dy;
}

template <Activation A>
using Chosen = std::integral_constant<Activation, A>;

template <class Body>
void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::none:
      return body(Chosen<Activation::none>{});
    case Activation::relu:
      return body(Chosen<Activation::relu>{});
    case Activation::leaky_relu:
      return body(Chosen<Activation::leaky_relu>{});
    case Activation::tanh:
      return body(Chosen<Activation::tanh>{});
    case Activation::sigmoid:
      return body(Chosen<Activation::sigmoid>{});
  }
}

int team(const NormActShape& s) {
  return s.batch * s.channels * s.spatial < kSerialValues ? 1 : s.threads;
}

// Mean and sum of squared deviations of `n` more values, into those of `count` (Chan et al. 1979).
void merge(double count, double n, double mean_n, double square_n, double& mean, double& square) {
  const double delta = mean_n - mean;
  const double share = n / (count + n);
  mean += delta * share;
  square += square_n + delta * delta * count * share;
}

// total[c] += the c-th of K vectors' lanes.
template <int K>
void add_lanes(const Vec* value, int count, double* total) {
  float lanes[K * Vec::width];
  for (int k = 0; k < K; ++k) store(lanes + k * Vec::width, value[k]);
  for (int c = 0; c < count; ++c) total[c] += lanes[c];
}

// Sums about a shift -> mean and sum of squared deviations of n values. With the mean of the first
// chunk as shift, the subtraction loses no more than the spread of the chunks allows.
void from_shifted(double n, double shift, double& first, double& second) {
  const double mean = first / n;
  second = std::max(0.0, second - first * mean);
  first = shift + mean;
}

template <class T, class Lanes>
void strip_moments(const T* x, int64_t rows, int64_t stride, Lanes lanes, double* mean,
                   double* square) {
  constexpr int K = Lanes::vectors;
  std::fill_n(mean, lanes.count(), 0.0);
  std::fill_n(square, lanes.count(), 0.0);
  Vec shift[K];
  for (int k = 0; k < K; ++k) shift[k] = Vec(0.0f);
  const int64_t head = std::min(kChunkRows, rows);
  for (int64_t i = 0; i < head; ++i) {
    for (int k = 0; k < K; ++k) shift[k] = shift[k] + lanes.get(x + i * stride, k);
  }
  for (int k = 0; k < K; ++k) shift[k] = shift[k] * Vec(1.0f / static_cast<float>(head));
  for (int64_t row = 0; row < rows; row += kChunkRows) {
    const int64_t end = std::min(row + kChunkRows, rows);
    Vec first[K], second[K];
    for (int k = 0; k < K; ++k) first[k] = second[k] = Vec(0.0f);
    for (int64_t i = row; i < end; ++i) {
      for (int k = 0; k < K; ++k) {
        const Vec d = lanes.get(x + i * stride, k) - shift[k];
        first[k] = first[k] + d;
        second[k] = fma(d, d, second[k]);
      }
    }
    add_lanes<K>(first, lanes.count(), mean);
    add_lanes<K>(second, lanes.count(), square);
  }
  float shifts[K * Vec::width];
  for (int k = 0; k < K; ++k) store(shifts + k * Vec::width, shift[k]);
  for (int c = 0; c < lanes.count(); ++c) {
    from_shifted(static_cast<double>(rows), shifts[c], mean[c], square[c]);
  }
}

template <Activation A, class T, class Lanes>
void strip_forward(const T* x, T* y, int64_t rows, int64_t stride, Lanes lanes, const float* mean,
                   const float* invstd, const float* weight, const float* bias, Vec slope) {
  constexpr int K = Lanes::vectors;
  Vec centre[K], scale[K], shift[K];
  for (int k = 0; k < K; ++k) {
    centre[k] = lanes.get(mean, k);
    scale[k] = lanes.get(invstd, k) * (weight ? lanes.get(weight, k) : Vec(1.0f));
    shift[k] = bias ? lanes.get(bias, k) : Vec(0.0f);
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int k = 0; k < K; ++k) {
      const Vec z = fma(lanes.get(x + i * stride, k) - centre[k], scale[k], shift[k]);
      lanes.put(y + i * stride, k, activate<A>(z, slope));
    }
  }
}

// Sums over rows of dz and of dz * (x - mean): float32 within a chunk, float64 beyond it.
template <Activation A, class T, class Lanes>
void strip_sums(const T* x, const T* dy, int64_t rows, int64_t stride, Lanes lanes,
                const float* mean, const float* invstd, const float* weight, const float* bias,
                Vec slope, double* sum_dz, double* sum_dzx) {
  constexpr int K = Lanes::vectors;
  Vec centre[K], scale[K], shift[K];
  for (int k = 0; k < K; ++k) {
    centre[k] = lanes.get(mean, k);
    scale[k] = lanes.get(invstd, k) * (weight ? lanes.get(weight, k) : Vec(1.0f));
    shift[k] = bias ? lanes.get(bias, k) : Vec(0.0f);
  }
  std::fill_n(sum_dz, lanes.count(), 0.0);
  std::fill_n(sum_dzx, lanes.count(), 0.0);
  for (int64_t row = 0; row < rows; row += kChunkRows) {
    const int64_t n = std::min(kChunkRows, rows - row);
    Vec a[K], b[K];
    for (int k = 0; k < K; ++k) a[k] = b[k] = Vec(0.0f);
    for (int64_t i = row; i < row + n; ++i) {
      for (int k = 0; k < K; ++k) {
        const Vec d = lanes.get(x + i * stride, k) - centre[k];
        const Vec dz =
            through_activation<A>(lanes.get(dy + i * stride, k), fma(d, scale[k], shift[k]), slope);
        a[k] = a[k] + dz;
        b[k] = fma(dz, d, b[k]);
      }
    }
    add_lanes<K>(a, lanes.count(), sum_dz);
    add_lanes<K>(b, lanes.count(), sum_dzx);
  }
}

// dx = scale * dz - offset - (x - mean) * tilt
template <Activation A, class T, class Lanes>
void strip_dx(const T* x, const T* dy, T* dx, int64_t rows, int64_t stride, Lanes lanes,
              const float* mean, const float* invstd, const float* weight, const float* bias,
              Vec slope, const float* offset, const float* tilt) {
  constexpr int K = Lanes::vectors;
  Vec centre[K], scale[K], shift[K], constant[K], linear[K];
  for (int k = 0; k < K; ++k) {
    centre[k] = lanes.get(mean, k);
    scale[k] = lanes.get(invstd, k) * (weight ? lanes.get(weight, k) : Vec(1.0f));
    shift[k] = bias ? lanes.get(bias, k) : Vec(0.0f);
    constant[k] = lanes.get(offset, k);
    linear[k] = lanes.get(tilt, k);
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int k = 0; k < K; ++k) {
      const Vec d = lanes.get(x + i * stride, k) - centre[k];
      const Vec dz =
          through_activation<A>(lanes.get(dy + i * stride, k), fma(d, scale[k], shift[k]), slope);
      lanes.put(dx + i * stride, k, scale[k] * dz - fma(d, linear[k], constant[k]));
    }
  }
}

// The affine map of one contiguous channel.
struct Channel {
  Vec centre, scale, shift, slope;
};

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
          use(lanes.get(x + i * stride + s + j, 0), lanes.count());
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
void channel_forward(const T* x, T* y, int64_t planes, int64_t spatial, int64_t stride, Channel c) {
  for (int64_t n = 0; n < planes; ++n) {
    for_each_vector(spatial, [&](int64_t j, auto lanes) {
      const Vec z = fma(lanes.get(x + n * stride + j, 0) - c.centre, c.scale, c.shift);
      lanes.put(y + n * stride + j, 0, activate<A>(z, c.slope));
    });
  }
}

template <Activation A, class T>
void channel_sums(const T* x, const T* dy, int64_t planes, int64_t spatial, int64_t stride,
                  Channel c, double& sum_dz, double& sum_dzx) {
  sum_dz = sum_dzx = 0.0;
  for_each_chunk(planes, spatial, [&](int64_t n, int64_t n_planes, int64_t s, int64_t length) {
    Vec a(0.0f), b(0.0f);
    for (int64_t i = n; i < n + n_planes; ++i) {
      for_each_vector(length, [&](int64_t j, auto lanes) {
        const int64_t at = i * stride + s + j;
        const Vec d = lanes.get(x + at, 0) - c.centre;
        const Vec dz =
            through_activation<A>(lanes.get(dy + at, 0), fma(d, c.scale, c.shift), c.slope);
        a = a + dz;
        b = fma(dz, d, b);
      });
    }
    sum_dz += sum(a);
    sum_dzx += sum(b);
  });
}

template <Activation A, class T>
void channel_dx(const T* x, const T* dy, T* dx, int64_t planes, int64_t spatial, int64_t stride,
                Channel c, Vec offset, Vec tilt) {
  for (int64_t n = 0; n < planes; ++n) {
    for_each_vector(spatial, [&](int64_t j, auto lanes) {
      const int64_t at = n * stride + j;
      const Vec d = lanes.get(x + at, 0) - c.centre;
      const Vec dz =
          through_activation<A>(lanes.get(dy + at, 0), fma(d, c.scale, c.shift), c.slope);
      lanes.put(dx + at, 0, c.scale * dz - fma(d, tilt, offset));
    });
  }
}

void finish_statistics(const NormActForward& args, int64_t g, int64_t c, double mean, double square,
                       double count) {
  const double variance = square / count;
  const int64_t at = g * args.shape.channels + c;
  args.mean[at] = static_cast<float>(mean);
  args.invstd[at] = static_cast<float>(1.0 / std::sqrt(variance + args.eps));
  const auto follow = [&](float* running, double value) {
    if (running) {
      running[c] = static_cast<float>((1.0 - args.momentum) * running[c] + args.momentum * value);
    }
  };
  follow(args.running_mean, mean);
  follow(args.running_var, square / (count - 1.0));
}

// Running statistics follow every group in order: this loop is serial over groups.
template <class Moments>
void finish_groups(const NormActForward& args, double count, const Moments& moments) {
  for (int64_t g = 0; g < args.shape.groups; ++g) {
    for (int64_t c = 0; c < args.shape.channels; ++c) {
      double mean, square;
      moments(g, c, mean, square);
      finish_statistics(args, g, c, mean, square, count);
    }
  }
}

// Sums of every group -> offset and tilt of its dx, and the parameters' gradients.
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

// Blocks of rows in parallel, strips of channels within a block: body(first row of the batch,
// rows, block, group, first channel, lanes).
template <class Body>
void for_each_block(const NormActShape& s, const Body& body) {
  const RowBlocks blocks = row_blocks(s);
  parallel_for(team(s), s.groups * blocks.count, [&](int64_t block) {
    const int64_t g = block / blocks.count;
    const int64_t start = block % blocks.count * blocks.size;
    const int64_t rows = std::min(blocks.size, blocks.rows - start);
    for_each_strip(s.channels, [&](int64_t c, auto lanes) {
      body(g * blocks.rows + start, rows, block, g, c, lanes);
    });
  });
}

template <class T>
void forward_channels_last(const NormActForward& args) {
  const NormActShape& s = args.shape;
  const T* x = static_cast<const T*>(args.x);
  T* y = static_cast<T*>(args.y);
  const int64_t C = s.channels;
  if (args.training) {
    for_each_block(s,
                   [&](int64_t row, int64_t rows, int64_t block, int64_t, int64_t c, auto lanes) {
                     double* moments = args.scratch + block * 2 * C;
                     strip_moments(x + row * C + c, rows, C, lanes, moments + c, moments + C + c);
                   });
    const RowBlocks blocks = row_blocks(s);
    finish_groups(args, static_cast<double>(blocks.rows),
                  [&](int64_t g, int64_t c, double& mean, double& square) {
                    mean = square = 0.0;
                    for (int64_t b = 0; b < blocks.count; ++b) {
                      const double* moments = args.scratch + (g * blocks.count + b) * 2 * C;
                      const int64_t before = b * blocks.size;
                      merge(static_cast<double>(before),
                            static_cast<double>(std::min(blocks.size, blocks.rows - before)),
                            moments[c], moments[C + c], mean, square);
                    }
                  });
  }
  const Vec slope(s.negative_slope);
  with_activation(s.activation, [&](auto chosen) {
    for_each_block(s, [&](int64_t row, int64_t rows, int64_t, int64_t g, int64_t c, auto lanes) {
      const int64_t at = row * C + c;
      strip_forward<decltype(chosen)::value>(
          x + at, y + at, rows, C, lanes, args.mean + g * C + c, args.invstd + g * C + c,
          args.weight ? args.weight + c : nullptr, args.bias ? args.bias + c : nullptr, slope);
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
  float* offset = reinterpret_cast<float*>(args.scratch + s.groups * blocks.count * 2 * C);
  float* tilt = offset + s.groups * C;
  const Vec slope(s.negative_slope);
  with_activation(s.activation, [&](auto chosen) {
    constexpr Activation A = decltype(chosen)::value;
    const auto of = [&](const float* parameter, int64_t c) {
      return parameter ? parameter + c : nullptr;
    };
    for_each_block(s, [&](int64_t row, int64_t rows, int64_t block, int64_t g, int64_t c,
                          auto lanes) {
      const int64_t at = row * C + c;
      double* sums = args.scratch + block * 2 * C;
      strip_sums<A>(x + at, dy + at, rows, C, lanes, args.mean + g * C + c, args.invstd + g * C + c,
                    of(args.weight, c), of(args.bias, c), slope, sums + c, sums + C + c);
    });
    finish_gradients(args, static_cast<double>(blocks.rows), offset, tilt,
                     [&](int64_t g, int64_t c, double& sum_dz, double& sum_dzx) {
                       sum_dz = sum_dzx = 0.0;
                       for (int64_t b = 0; b < blocks.count; ++b) {
                         const double* sums = args.scratch + (g * blocks.count + b) * 2 * C;
                         sum_dz += sums[c];
                         sum_dzx += sums[C + c];
                       }
                     });
    if (!dx) return;
    for_each_block(s, [&](int64_t row, int64_t rows, int64_t, int64_t g, int64_t c, auto lanes) {
      const int64_t at = row * C + c;
      strip_dx<A>(x + at, dy + at, dx + at, rows, C, lanes, args.mean + g * C + c,
                  args.invstd + g * C + c, of(args.weight, c), of(args.bias, c), slope,
                  offset + g * C + c, tilt + g * C + c);
    });
  });
}

template <class Args>
Channel channel_of(const Args& args, int64_t g, int64_t c) {
  const int64_t at = g * args.shape.channels + c;
  return {Vec(args.mean[at]), Vec(args.weight ? args.invstd[at] * args.weight[c] : args.invstd[at]),
          Vec(args.bias ? args.bias[c] : 0.0f), Vec(args.shape.negative_slope)};
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
      channel_forward<decltype(chosen)::value>(x + at, y + at, planes, s.spatial, stride,
                                               channel_of(args, g, c));
    });
  });
  if (!args.training) return;
  finish_groups(args, count, [&](int64_t g, int64_t c, double& mean, double& square) {
    mean = args.scratch[(g * s.channels + c) * 2];
    square = args.scratch[(g * s.channels + c) * 2 + 1];
  });
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
      const Channel channel = channel_of(args, g, c);
      const int64_t gc = g * s.channels + c;
      double* sums = args.scratch + gc * 2;
      channel_sums<A>(x + at, dy + at, planes, s.spatial, stride, channel, sums[0], sums[1]);
      if (!dx) return;
      const double invstd = args.invstd[gc];
      const double share =
          args.training ? invstd * (args.weight ? args.weight[c] : 1.0f) / count : 0.0;
      channel_dx<A>(x + at, dy + at, dx + at, planes, s.spatial, stride, channel,
                    Vec(static_cast<float>(share * sums[0])),
                    Vec(static_cast<float>(share * sums[1] * invstd * invstd)));
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
