// Normalise + activate, forward and backward. Bound by memory: forward reads x twice (once in
// evaluation) and writes y, backward reads x and dy twice and writes dx; about 10 FLOPs a value.
//
// Sums take two stages without atomics: a block leaves one partial result a channel, and a block
// per 32 channels merges these in order. Means and squared deviations are merged as in Chan,
// Golub and LeVeque 1983, so that a large mean costs no digits.

#include <type_traits>

#include "cuda/device.cuh"

namespace pygan::cuda {
namespace {

constexpr int kRowsAtOnce = 4;
constexpr int64_t kWantedBlocks = 1024;
constexpr int64_t kLeastChunk = 4096;  // values of a map below which one more block does not pay
constexpr int64_t kMaxChunks = 256;
constexpr int64_t kFewGroups = 4;  // that one block sums one after another

// The map as the kernels walk it, in `chunks` parts of each group.
//   channels_last: rows of C values; a block is `lanes` packs of channels by `rows` rows.
//   contiguous: the runs of S values that a channel has in each image of the group.
struct Walk {
  int64_t channels, spatial, images;  // images of one group
  int64_t chunk, total;               // rows or values of a chunk, and of a group
  int chunks, groups, lanes, rows;
};

struct Activated {
  Activation activation;
  float slope;
};

struct Moments {
  float count, mean, m2;
};

__device__ Moments merged(const Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  if (b.count == 0.0f) return a;
  const float delta = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// What a channel of a group takes: z = (x - mean) * scale + shift, and behind the sums of backward
// dx = scale * (dz - first - (x - mean) * second). Five runs of [channels] a group.
constexpr int kMean = 0, kScale = 1, kShift = 2, kFirst = 3, kSecond = 4, kMaps = 5;

// Where the rows of a channels_last block lie.
struct Tile {
  int64_t channel;  // first of the thread's pack
  int64_t begin, end;
  int row;
  bool inside;
};

template <int N>
__device__ Tile tile_of(const Walk& walk) {
  const int lane = threadIdx.x % walk.lanes;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * walk.lanes + lane) * N;
  const int64_t first = walk.total * blockIdx.z;
  const int64_t begin = blockIdx.y * walk.chunk, end = begin + walk.chunk;
  return {channel, first + begin, first + (end < walk.total ? end : walk.total),
          static_cast<int>(threadIdx.x) / walk.lanes, channel < walk.channels};
}

// mean and m2 of each channel and chunk -> partial [2, groups, chunks, channels].
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    moments_last_kernel(double* partial, const T* x, Walk walk) {
  const Tile tile = tile_of<N>(walk);
  // Means are counted from the group's first value, or float32 would round a large one.
  float pivot[N], mean[N], m2[N], count = 0.0f;
#pragma unroll
  for (int k = 0; k < N; ++k) pivot[k] = mean[k] = m2[k] = 0.0f;
  if (tile.inside) {
    load(x + blockIdx.z * walk.total * walk.channels + tile.channel, pivot);
    for (int64_t row = tile.begin + tile.row; row < tile.end; row += kRowsAtOnce * walk.rows) {
      float values[kRowsAtOnce][N];
      int present = 0;
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const int64_t at = row + r * walk.rows;
        if (at < tile.end) {
          load(x + at * walk.channels + tile.channel, values[r]);
#pragma unroll
          for (int k = 0; k < N; ++k) values[r][k] -= pivot[k];
          ++present;
        }
      }
      const float here = static_cast<float>(present), each = 1.0f / here;
      const float share = here / (count + here), weight = count * share;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        float sum = 0.0f;
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) sum += r < present ? values[r][k] : 0.0f;
        const float local = sum * each, delta = local - mean[k];
        float squares = 0.0f;
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          const float d = r < present ? values[r][k] - local : 0.0f;
          squares += d * d;
        }
        mean[k] += delta * share;
        m2[k] += squares + delta * delta * weight;
      }
      count += here;
    }
  }
  __shared__ Moments shared[kThreads];
  const int64_t plane = static_cast<int64_t>(walk.groups) * walk.chunks * walk.channels;
  const int64_t at = (static_cast<int64_t>(blockIdx.z) * walk.chunks + blockIdx.y) * walk.channels;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    __syncthreads();
    shared[threadIdx.x] = {count, mean[k], m2[k]};
    for (int half = walk.rows / 2; half > 0; half /= 2) {
      __syncthreads();
      if (tile.row < half) {
        const Moments other = shared[threadIdx.x + half * walk.lanes];
        shared[threadIdx.x] = merged(shared[threadIdx.x], other);
      }
    }
    if (tile.row == 0 && tile.inside) {
      partial[at + tile.channel + k] = static_cast<double>(shared[threadIdx.x].mean) + pivot[k];
      partial[plane + at + tile.channel + k] = shared[threadIdx.x].m2;
    }
  }
}

// Values of a channel of a contiguous map: positions count through its runs in the group's images.
struct Runs {
  int64_t base, stride, begin, end;
};

__device__ Runs runs_of(const Walk& walk) {
  const int64_t stride = walk.channels * walk.spatial;
  const int64_t begin = blockIdx.y * walk.chunk, end = begin + walk.chunk;
  return {blockIdx.z * walk.images * stride + blockIdx.x * walk.spatial, stride, begin,
          end < walk.total ? end : walk.total};
}

__device__ int64_t address(const Runs& runs, const Walk& walk, int64_t position) {
  const int64_t image = position / walk.spatial;
  return runs.base + image * runs.stride + (position - image * walk.spatial);
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    moments_first_kernel(double* partial, const T* x, Walk walk) {
  const Runs runs = runs_of(walk);
  const float pivot = to_float(x[runs.base]);  // as in moments_last_kernel
  Moments sums{0.0f, 0.0f, 0.0f};
  for (int64_t p = runs.begin + threadIdx.x * N; p < runs.end; p += kThreads * N) {
    float values[N], local = 0.0f, squares = 0.0f;
    load(x + address(runs, walk, p), values);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      values[k] -= pivot;
      local += values[k];
    }
    local *= 1.0f / N;
#pragma unroll
    for (int k = 0; k < N; ++k) squares += (values[k] - local) * (values[k] - local);
    sums = merged(sums, {static_cast<float>(N), local, squares});
  }
  __shared__ Moments shared[kThreads];
  shared[threadIdx.x] = sums;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      shared[threadIdx.x] = merged(shared[threadIdx.x], shared[threadIdx.x + half]);
    }
  }
  if (threadIdx.x == 0) {
    const int64_t plane = static_cast<int64_t>(walk.groups) * walk.chunks * walk.channels;
    const int64_t at =
        (static_cast<int64_t>(blockIdx.z) * walk.chunks + blockIdx.y) * walk.channels + blockIdx.x;
    partial[at] = static_cast<double>(shared[0].mean) + pivot;
    partial[plane + at] = shared[0].m2;
  }
}

struct Statistics {
  const float *weight, *bias;
  double eps, momentum;
  float *running_mean, *running_var, *mean, *invstd, *coefficients, *variance;
};

__device__ void write_maps(float* maps, float* coefficients, int64_t channels, int64_t g, int64_t c,
                           float mean, float scale, float shift) {
  float* own = maps + g * kMaps * channels + c;
  own[kMean * channels] = mean;
  own[kScale * channels] = scale;
  own[kShift * channels] = shift;
  if (coefficients) {
    float* out = coefficients + g * 3 * channels + c;
    out[0] = mean;
    out[channels] = scale;
    out[2 * channels] = shift;
  }
}

// Whose groups a block takes: a run of them where there are several blocks for as many channels.
struct Groups {
  int64_t begin, end;
};

__device__ Groups groups_of(const Walk& walk) {
  const int64_t each = walk.groups / gridDim.y;
  return {blockIdx.y * each, (blockIdx.y + 1) * each};
}

// 32 channels a block; its warps share the chunks, group after group as the running statistics go,
// or one group where there are none.
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(float* maps, const double* partial, Walk walk, Statistics to) {
  __shared__ double shared[3][kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t C = walk.channels, c = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const int64_t plane = static_cast<int64_t>(walk.groups) * walk.chunks * C;
  const Groups groups = groups_of(walk);
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    double count = 0.0, mean = 0.0, m2 = 0.0;
    const auto merge = [&](double other_count, double other_mean, double other_m2) {
      if (other_count == 0.0) return;
      const double delta = other_mean - mean, share = other_count / (count + other_count);
      mean += delta * share;
      m2 += other_m2 + delta * delta * count * share;
      count += other_count;
    };
    if (c < C) {
      for (int k = warp; k < walk.chunks; k += kWarps) {
        const int64_t left = walk.total - k * walk.chunk, at = (g * walk.chunks + k) * C + c;
        merge(static_cast<double>(left < walk.chunk ? left : walk.chunk), partial[at],
              partial[plane + at]);
      }
    }
    __syncthreads();
    shared[0][warp][lane] = count;
    shared[1][warp][lane] = mean;
    shared[2][warp][lane] = m2;
    __syncthreads();
    if (warp != 0 || c >= C) continue;
    for (int w = 1; w < kWarps; ++w)
      merge(shared[0][w][lane], shared[1][w][lane], shared[2][w][lane]);
    const double variance = m2 / count;
    const float centre = static_cast<float>(mean);
    const float invstd = static_cast<float>(1.0 / sqrt(variance + to.eps));
    to.mean[g * C + c] = centre;
    to.invstd[g * C + c] = invstd;
    if (to.variance) to.variance[g * C + c] = static_cast<float>(m2 / (count - 1.0));
    if (to.running_mean) {
      to.running_mean[c] =
          static_cast<float>(to.running_mean[c] + to.momentum * (mean - to.running_mean[c]));
    }
    if (to.running_var) {
      const double unbiased = m2 / (count - 1.0);
      to.running_var[c] =
          static_cast<float>(to.running_var[c] + to.momentum * (unbiased - to.running_var[c]));
    }
    write_maps(maps, to.coefficients, C, g, c, centre, invstd * (to.weight ? to.weight[c] : 1.0f),
               to.bias ? to.bias[c] : 0.0f);
  }
}

// Maps of statistics that are given: of mean and invstd, or of running ones, which fill these.
__global__ void __launch_bounds__(kThreads)
    maps_kernel(float* maps, int64_t channels, Statistics from) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, g = blockIdx.y;
  if (c >= channels) return;
  const int64_t at = g * channels + c;
  if (from.running_mean) {
    from.mean[at] = from.running_mean[c];
    from.invstd[at] = static_cast<float>(1.0 / sqrt(from.running_var[c] + from.eps));
  }
  write_maps(maps, from.coefficients, channels, g, c, from.mean[at],
             from.invstd[at] * (from.weight ? from.weight[c] : 1.0f),
             from.bias ? from.bias[c] : 0.0f);
  float* own = maps + g * kMaps * channels + c;
  own[kFirst * channels] = own[kSecond * channels] = 0.0f;
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    apply_last_kernel(T* y, const T* x, const float* maps, Walk walk, Activated f) {
  const Tile tile = tile_of<N>(walk);
  if (!tile.inside) return;
  const float* own = maps + blockIdx.z * kMaps * walk.channels + tile.channel;
  float mean[N], scale[N], shift[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    mean[k] = own[kMean * walk.channels + k];
    scale[k] = own[kScale * walk.channels + k];
    shift[k] = own[kShift * walk.channels + k];
  }
#pragma unroll 2
  for (int64_t row = tile.begin + tile.row; row < tile.end; row += walk.rows) {
    const int64_t at = row * walk.channels + tile.channel;
    float values[N];
    load(x + at, values);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      values[k] = activate(f.activation, fmaf(values[k] - mean[k], scale[k], shift[k]), f.slope);
    }
    store(y + at, values);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    apply_first_kernel(T* y, const T* x, const float* maps, Walk walk, Activated f) {
  const Runs runs = runs_of(walk);
  const float* own = maps + blockIdx.z * kMaps * walk.channels + blockIdx.x;
  const float mean = own[kMean * walk.channels], scale = own[kScale * walk.channels];
  const float shift = own[kShift * walk.channels];
  for (int64_t p = runs.begin + threadIdx.x * N; p < runs.end; p += kThreads * N) {
    const int64_t at = address(runs, walk, p);
    float values[N];
    load(x + at, values);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      values[k] = activate(f.activation, fmaf(values[k] - mean, scale, shift), f.slope);
    }
    store(y + at, values);
  }
}

// sum dz and sum dz (x - mean) of each channel and chunk -> partial [2, groups, chunks, channels].
template <class T, int N>
__global__ void __launch_bounds__(kThreads, N == 1 ? 4 : 2)
    sums_last_kernel(double* partial, const T* x, const T* dy, const float* maps, Walk walk,
                     Activated f) {
  const Tile tile = tile_of<N>(walk);
  float first[N], second[N];
#pragma unroll
  for (int k = 0; k < N; ++k) first[k] = second[k] = 0.0f;
  if (tile.inside) {
    const float* own = maps + blockIdx.z * kMaps * walk.channels + tile.channel;
    float mean[N], scale[N], shift[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      mean[k] = own[kMean * walk.channels + k];
      scale[k] = own[kScale * walk.channels + k];
      shift[k] = own[kShift * walk.channels + k];
    }
#pragma unroll 2
    for (int64_t row = tile.begin + tile.row; row < tile.end; row += walk.rows) {
      const int64_t at = row * walk.channels + tile.channel;
      float values[N], grads[N];
      load(x + at, values);
      load(dy + at, grads);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float d = values[k] - mean[k];
        const float dz =
            through_activation(f.activation, grads[k], fmaf(d, scale[k], shift[k]), f.slope);
        first[k] += dz;
        second[k] = fmaf(dz, d, second[k]);
      }
    }
  }
  __shared__ double shared[2][kThreads];
  const int64_t plane = static_cast<int64_t>(walk.groups) * walk.chunks * walk.channels;
  const int64_t at = (static_cast<int64_t>(blockIdx.z) * walk.chunks + blockIdx.y) * walk.channels;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    __syncthreads();
    shared[0][threadIdx.x] = first[k];
    shared[1][threadIdx.x] = second[k];
    for (int half = walk.rows / 2; half > 0; half /= 2) {
      __syncthreads();
      if (tile.row < half) {
        shared[0][threadIdx.x] += shared[0][threadIdx.x + half * walk.lanes];
        shared[1][threadIdx.x] += shared[1][threadIdx.x + half * walk.lanes];
      }
    }
    if (tile.row == 0 && tile.inside) {
      partial[at + tile.channel + k] = shared[0][threadIdx.x];
      partial[plane + at + tile.channel + k] = shared[1][threadIdx.x];
    }
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    sums_first_kernel(double* partial, const T* x, const T* dy, const float* maps, Walk walk,
                      Activated f) {
  const Runs runs = runs_of(walk);
  const float* own = maps + blockIdx.z * kMaps * walk.channels + blockIdx.x;
  const float mean = own[kMean * walk.channels], scale = own[kScale * walk.channels];
  const float shift = own[kShift * walk.channels];
  float first = 0.0f, second = 0.0f;
  for (int64_t p = runs.begin + threadIdx.x * N; p < runs.end; p += kThreads * N) {
    const int64_t at = address(runs, walk, p);
    float values[N], grads[N];
    load(x + at, values);
    load(dy + at, grads);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float d = values[k] - mean;
      const float dz = through_activation(f.activation, grads[k], fmaf(d, scale, shift), f.slope);
      first += dz;
      second = fmaf(dz, d, second);
    }
  }
  __shared__ double shared[kWarps];
  const double every_first = block_sum(static_cast<double>(first), shared);
  const double every_second = block_sum(static_cast<double>(second), shared);
  if (threadIdx.x == 0) {
    const int64_t plane = static_cast<int64_t>(walk.groups) * walk.chunks * walk.channels;
    const int64_t at =
        (static_cast<int64_t>(blockIdx.z) * walk.chunks + blockIdx.y) * walk.channels + blockIdx.x;
    partial[at] = every_first;
    partial[plane + at] = every_second;
  }
}

struct ParameterGrads {
  const float* invstd;
  float *dweight, *dbias;
  bool training;
};

// As statistics_kernel: the sums of each group become maps, those of all of them gradients, or what
// parameter_grads_kernel reads, in the first chunk's place.
__global__ void __launch_bounds__(kThreads)
    grads_kernel(float* maps, double* partial, Walk walk, ParameterGrads to) {
  __shared__ double shared[2][kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t C = walk.channels, c = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const int64_t plane = static_cast<int64_t>(walk.groups) * walk.chunks * C;
  const double count = static_cast<double>(walk.images) * walk.spatial;
  const Groups groups = groups_of(walk);
  double dweight = 0.0, dbias = 0.0;
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    double first = 0.0, second = 0.0;
    if (c < C) {
      for (int k = warp; k < walk.chunks; k += kWarps) {
        const int64_t at = (g * walk.chunks + k) * C + c;
        first += partial[at];
        second += partial[plane + at];
      }
    }
    __syncthreads();
    shared[0][warp][lane] = first;
    shared[1][warp][lane] = second;
    __syncthreads();
    if (warp != 0 || c >= C) continue;
    for (int w = 1; w < kWarps; ++w) {
      first += shared[0][w][lane];
      second += shared[1][w][lane];
    }
    const double invstd = to.invstd[g * C + c];
    dbias += first;
    dweight += second * invstd;
    float* own = maps + g * kMaps * C + c;
    own[kFirst * C] = to.training ? static_cast<float>(first / count) : 0.0f;
    own[kSecond * C] = to.training ? static_cast<float>(second * invstd * invstd / count) : 0.0f;
    if (gridDim.y > 1) {
      partial[g * walk.chunks * C + c] = first;
      partial[plane + g * walk.chunks * C + c] = second * invstd;
    }
  }
  if (warp != 0 || c >= C || gridDim.y > 1) return;
  if (to.dweight) to.dweight[c] = static_cast<float>(dweight);
  if (to.dbias) to.dbias[c] = static_cast<float>(dbias);
}

// 32 channels a block; its warps share the groups.
__global__ void __launch_bounds__(kThreads)
    parameter_grads_kernel(const double* partial, Walk walk, ParameterGrads to) {
  __shared__ double shared[2][kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t C = walk.channels, c = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const int64_t plane = static_cast<int64_t>(walk.groups) * walk.chunks * C;
  double dweight = 0.0, dbias = 0.0;
  if (c < C) {
    for (int64_t g = warp; g < walk.groups; g += kWarps) {
      dbias += partial[g * walk.chunks * C + c];
      dweight += partial[plane + g * walk.chunks * C + c];
    }
  }
  shared[0][warp][lane] = dweight;
  shared[1][warp][lane] = dbias;
  __syncthreads();
  if (warp != 0 || c >= C) return;
  for (int w = 1; w < kWarps; ++w) {
    dweight += shared[0][w][lane];
    dbias += shared[1][w][lane];
  }
  if (to.dweight) to.dweight[c] = static_cast<float>(dweight);
  if (to.dbias) to.dbias[c] = static_cast<float>(dbias);
}

__device__ inline float input_grad(const Activated& f, float x, float dy,
                                   const float (&map)[kMaps]) {
  const float d = x - map[kMean];
  const float z = fmaf(d, map[kScale], map[kShift]);
  const float dz = through_activation(f.activation, dy, z, f.slope);
  return map[kScale] * (dz - map[kFirst] - d * map[kSecond]);
}

// dx may be dy: each thread writes what it alone has read.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    input_grad_last_kernel(T* dx, const T* x, const T* dy, const float* maps, Walk walk,
                           Activated f) {
  const Tile tile = tile_of<N>(walk);
  if (!tile.inside) return;
  float own[N][kMaps];
#pragma unroll
  for (int k = 0; k < N; ++k) {
#pragma unroll
    for (int m = 0; m < kMaps; ++m) {
      own[k][m] = maps[(blockIdx.z * kMaps + m) * walk.channels + tile.channel + k];
    }
  }
#pragma unroll 2
  for (int64_t row = tile.begin + tile.row; row < tile.end; row += walk.rows) {
    const int64_t at = row * walk.channels + tile.channel;
    float values[N], grads[N];
    load(x + at, values);
    load(dy + at, grads);
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] = input_grad(f, values[k], grads[k], own[k]);
    store(dx + at, values);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    input_grad_first_kernel(T* dx, const T* x, const T* dy, const float* maps, Walk walk,
                            Activated f) {
  const Runs runs = runs_of(walk);
  float own[kMaps];
#pragma unroll
  for (int m = 0; m < kMaps; ++m) {
    own[m] = maps[(blockIdx.z * kMaps + m) * walk.channels + blockIdx.x];
  }
  for (int64_t p = runs.begin + threadIdx.x * N; p < runs.end; p += kThreads * N) {
    const int64_t at = address(runs, walk, p);
    float values[N], grads[N];
    load(x + at, values);
    load(dy + at, grads);
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] = input_grad(f, values[k], grads[k], own);
    store(dx + at, values);
  }
}

bool last(const NormActShape& s) { return s.layout == Layout::channels_last || s.spatial == 1; }

int64_t pack_of(const NormActShape& s, bool aligned_arrays) {
  const int64_t pack = s.dtype == DType::f32 ? 4 : 8;
  return aligned_arrays && (last(s) ? s.channels : s.spatial) % pack == 0 ? pack : 1;
}

Walk walk_of(const NormActShape& s, int64_t pack) {
  Walk walk{s.channels, s.spatial, s.batch / s.groups, 0, 0, 0, static_cast<int>(s.groups), 1, 1};
  walk.total = walk.images * s.spatial;
  const int64_t packs = s.channels / pack;
  while (walk.lanes < kWarp && walk.lanes < packs) walk.lanes *= 2;
  walk.rows = kThreads / walk.lanes;
  const int64_t across = last(s) ? div_up(packs, walk.lanes) : s.channels;
  const int64_t width = last(s) ? (packs < kWarp ? s.channels : kWarp * pack) : 1;
  int64_t chunks = div_up(kWantedBlocks, across * s.groups);
  const int64_t most = div_up(walk.total * width, kLeastChunk);
  chunks = chunks < most ? chunks : most;
  chunks = chunks < kMaxChunks ? chunks : kMaxChunks;
  walk.chunk = div_up(div_up(walk.total, chunks), 8) * 8;  // packs do not straddle chunks
  walk.chunks = static_cast<int>(div_up(walk.total, walk.chunk));
  return walk;
}

dim3 grid_of(const NormActShape& s, const Walk& walk, int64_t pack) {
  const int64_t across = last(s) ? div_up(s.channels / pack, walk.lanes) : s.channels;
  return dim3(static_cast<unsigned>(across), static_cast<unsigned>(walk.chunks),
              static_cast<unsigned>(walk.groups));
}

int64_t map_elements(const NormActShape& s) { return div_up(kMaps * s.groups * s.channels, 2); }

Status check(const NormActShape& s) {
  if (s.batch < 0 || s.channels < 0 || s.spatial < 0 || s.groups < 1 || s.batch % s.groups != 0 ||
      s.groups > kMaxGridY || s.channels > 0x7fffffff) {
    return Status::bad_size;
  }
  return known(s.dtype) && known(s.layout) && known(s.activation) ? Status::ok : Status::bad_enum;
}

bool empty(const NormActShape& s) { return s.batch * s.channels * s.spatial == 0; }

unsigned channel_blocks(const NormActShape& s, int each) {
  return static_cast<unsigned>(div_up(s.channels, each));
}

// Calls body with the element type and with the pack, as types.
template <class Body>
void with_pack(const NormActShape& s, int64_t pack, const Body& body) {
  with_type(s.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (pack == 1) {
      body(type, std::integral_constant<int, 1>{});
    } else {
      body(type, std::integral_constant<int, kPack<T>>{});
    }
  });
}

}  // namespace

int64_t norm_act_scratch(const NormActShape& s) {
  if (check(s) != Status::ok || empty(s)) return 1;
  const int64_t scalar = walk_of(s, 1).chunks, packed = walk_of(s, pack_of(s, true)).chunks;
  return map_elements(s) + 2 * s.groups * s.channels * (scalar > packed ? scalar : packed);
}

Outcome norm_act_forward(const NormActForward& args, float* variance, Stream stream) {
  const NormActShape& s = args.shape;
  if (const Status status = check(s); status != Status::ok) return {status};
  if (empty(s)) return args.training ? Outcome{Status::bad_size} : Outcome{};
  if (!args.x || !args.mean || !args.invstd || !args.scratch ||
      (!args.y && !args.training && !args.coefficients) ||
      (!args.training && !args.running_mean != !args.running_var)) {
    return {Status::bad_pointer};
  }
  const int64_t pack = pack_of(s, aligned(args.x) && aligned(args.y));
  const Walk walk = walk_of(s, pack);
  const dim3 grid = grid_of(s, walk, pack);
  const Activated f{s.activation, s.negative_slope};
  const Statistics statistics{args.weight,       args.bias,        args.eps,  args.momentum,
                              args.running_mean, args.running_var, args.mean, args.invstd,
                              args.coefficients, variance};
  float* maps = reinterpret_cast<float*>(args.scratch);
  double* partial = args.scratch + map_elements(s);
  const bool in_turn = args.running_mean || args.running_var;
  const unsigned runs = in_turn ? 1 : static_cast<unsigned>(s.groups);
  with_pack(s, pack, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = decltype(width)::value;
    const T* x = static_cast<const T*>(args.x);
    if (args.training) {
      launch(last(s) ? moments_last_kernel<T, N> : moments_first_kernel<T, N>, grid, kThreads,
             stream, partial, x, walk);
      launch(statistics_kernel, dim3(channel_blocks(s, kWarp), runs), kThreads, stream, maps,
             partial, walk, statistics);
    } else {
      launch(maps_kernel, dim3(channel_blocks(s, kThreads), static_cast<unsigned>(s.groups)),
             kThreads, stream, maps, s.channels, statistics);
    }
    if (args.y) {
      launch(last(s) ? apply_last_kernel<T, N> : apply_first_kernel<T, N>, grid, kThreads, stream,
             static_cast<T*>(args.y), x, maps, walk, f);
    }
  });
  return launched();
}

Outcome norm_act_backward(const NormActBackward& args, Stream stream) {
  const NormActShape& s = args.shape;
  if (const Status status = check(s); status != Status::ok) return {status};
  if (empty(s)) return {Status::bad_size};
  if (!args.x || !args.dy || !args.mean || !args.invstd || !args.scratch) {
    return {Status::bad_pointer};
  }
  const int64_t pack = pack_of(s, aligned(args.x) && aligned(args.dy) && aligned(args.dx));
  const Walk walk = walk_of(s, pack);
  const dim3 grid = grid_of(s, walk, pack);
  const Activated f{s.activation, s.negative_slope};
  Statistics statistics{};
  statistics.weight = args.weight;
  statistics.bias = args.bias;
  statistics.mean = const_cast<float*>(args.mean);
  statistics.invstd = const_cast<float*>(args.invstd);
  float* maps = reinterpret_cast<float*>(args.scratch);
  double* partial = args.scratch + map_elements(s);
  with_pack(s, pack, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = decltype(width)::value;
    const T* x = static_cast<const T*>(args.x);
    const T* dy = static_cast<const T*>(args.dy);
    launch(maps_kernel, dim3(channel_blocks(s, kThreads), static_cast<unsigned>(s.groups)),
           kThreads, stream, maps, s.channels, statistics);
    if (args.dweight || args.dbias || (args.dx && args.training)) {
      launch(last(s) ? sums_last_kernel<T, N> : sums_first_kernel<T, N>, grid, kThreads, stream,
             partial, x, dy, maps, walk, f);
      const ParameterGrads grads{args.invstd, args.dweight, args.dbias, args.training};
      const unsigned runs = s.groups > kFewGroups ? static_cast<unsigned>(s.groups) : 1;
      launch(grads_kernel, dim3(channel_blocks(s, kWarp), runs), kThreads, stream, maps, partial,
             walk, grads);
      if (runs > 1 && (args.dweight || args.dbias)) {
        launch(parameter_grads_kernel, dim3(channel_blocks(s, kWarp)), kThreads, stream, partial,
               walk, grads);
      }
    }
    if (args.dx) {
      launch(last(s) ? input_grad_last_kernel<T, N> : input_grad_first_kernel<T, N>, grid, kThreads,
             stream, static_cast<T*>(args.dx), x, dy, maps, walk, f);
    }
  });
  return launched();
}

}  // namespace pygan::cuda
