// The image layers: the 4x4 convolution of stride 2 between 1 to 4 big channels and many small
// ones, channels_last, float32 weights and sums. Per small value: 2 or 4 bytes, and 16 FMAs for
// each big channel, which three big channels leave bound by memory on float32 units.
//
// down and weight_grad: a lane is a small channel with all its taps in registers; big comes from
// shared memory, the same value for a whole warp. up: a thread is the corner of 2x2 big pixels,
// which the same 2x2 small ones reach; weights come from shared memory.

#include <type_traits>

#include "cuda/device.cuh"

namespace pygan::cuda {
namespace {

constexpr int kTaps = 16;
constexpr int kTileHeight = 8, kTileWidth = 16;  // small positions of a tile
constexpr int kBigHeight = 2 * kTileHeight + 2, kBigWidth = 2 * kTileWidth + 2;
constexpr int kTilePositions = kTileHeight * kTileWidth;
constexpr int kUpChannels = 32;  // small channels of up that shared memory holds at once
constexpr int kBlocksPerSm = 2;  // named, or the compiler spills a little to fit a third
constexpr int64_t kMaxTileBlocks = 2048;
constexpr int64_t kGradBlocks = 256;
constexpr int kGradTaps = 8;  // reduced over the warps at once

struct Map {
  int64_t batch;
  int height, width, big_height, big_width, small_channels, big_channels;
  int tiles_down, tiles_across;
  int64_t tiles;
  bool weight_last;
};

struct Gate {
  const void* values;
  float slope;
};

__device__ int64_t weight_index(const Map& map, int a, int tap, int b) {
  return map.weight_last ? (static_cast<int64_t>(a) * kTaps + tap) * map.big_channels + b
                         : (static_cast<int64_t>(a) * map.big_channels + b) * kTaps + tap;
}

struct TileAt {
  int64_t image;
  int y, x;  // of its first small position
};

__device__ TileAt tile_at(const Map& map, int64_t tile) {
  const int64_t row = tile / map.tiles_across;
  return {row / map.tiles_down, static_cast<int>(row % map.tiles_down) * kTileHeight,
          static_cast<int>(tile - row * map.tiles_across) * kTileWidth};
}

// The big pixels that a tile reaches, zero outside the map; B channels a pixel, zero beyond.
template <class T, int B>
__device__ void stage(float (&shared)[kBigHeight][kBigWidth][B], const T* big, const Map& map,
                      const TileAt& at) {
  for (int i = threadIdx.x; i < kBigHeight * kBigWidth * B; i += kThreads) {
    const int b = i % B, column = i / B % kBigWidth, row = i / B / kBigWidth;
    const int p = 2 * at.y - 1 + row, q = 2 * at.x - 1 + column;
    const bool inside =
        p >= 0 && p < map.big_height && q >= 0 && q < map.big_width && b < map.big_channels;
    const int64_t from =
        ((at.image * map.big_height + p) * map.big_width + q) * map.big_channels + b;
    shared[row][column][b] = inside ? to_float(big[from]) : 0.0f;
  }
}

template <class T, int B>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    down_kernel(T* small, const T* big, const float* weight, const float* bias, Map map,
                Activation activation, float slope) {
  alignas(16) __shared__ float shared[kBigHeight][kBigWidth][B];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int a = blockIdx.y * kWarp + lane;
  const bool mine = a < map.small_channels;
  float taps[kTaps][B];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
    for (int b = 0; b < B; ++b) {
      taps[tap][b] = mine && b < map.big_channels ? weight[weight_index(map, a, tap, b)] : 0.0f;
    }
  }
  const float start = mine && bias ? bias[a] : 0.0f;
  for (int64_t tile = blockIdx.x; tile < map.tiles; tile += gridDim.x) {
    const TileAt at = tile_at(map, tile);
    __syncthreads();
    stage<T, B>(shared, big, map, at);
    __syncthreads();
    for (int position = warp; position < kTilePositions; position += kWarps) {
      const int row = position / kTileWidth, column = position % kTileWidth;
      const int y = at.y + row, x = at.x + column;
      if (!mine || y >= map.height || x >= map.width) continue;
      float sum = start;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
        for (int b = 0; b < B; ++b) {
          sum = fmaf(shared[2 * row + tap / 4][2 * column + tap % 4][b], taps[tap][b], sum);
        }
      }
      const int64_t to = ((at.image * map.height + y) * map.width + x) * map.small_channels + a;
      small[to] = from_float<T>(activate(activation, sum, slope));
    }
  }
}

// N small channels from p, through the gate where there is one.
template <int N, class T>
__device__ void load_gated(const T* small, const Gate& gate, int64_t at, float (&out)[N]) {
  load(small + at, out);
  if (!gate.values) return;
  float gates[N];
  load(static_cast<const T*>(gate.values) + at, gates);
#pragma unroll
  for (int k = 0; k < N; ++k) out[k] = gates[k] > 0.0f ? out[k] : out[k] * gate.slope;
}

// Corner (y, x) has the big pixels (2y - 1, 2y) x (2x - 1, 2x), and the small ones (y - 1, y) x
// (x - 1, x); the tap between row p of the former and r of the latter is i = 2 (1 - r) + p.
template <class T, int B, int N>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    up_kernel(T* big, const T* small, Gate gate, const float* weight, const float* bias, Map map,
              Activation activation) {
  alignas(16) __shared__ float shared[kUpChannels][kTaps][B];
  const int corners_across = map.width + 1, corners_down = map.height + 1;
  const int64_t corner = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t image = corner / (static_cast<int64_t>(corners_across) * corners_down);
  const int x = static_cast<int>(corner % corners_across);
  const int y = static_cast<int>(corner / corners_across % corners_down);
  const bool mine = image < map.batch;
  float sums[4][B];
#pragma unroll
  for (int pixel = 0; pixel < 4; ++pixel) {
#pragma unroll
    for (int b = 0; b < B; ++b) {
      sums[pixel][b] = bias && b < map.big_channels ? bias[b] : 0.0f;
    }
  }
  for (int first = 0; first < map.small_channels; first += kUpChannels) {
    const int left = map.small_channels - first, here = left < kUpChannels ? left : kUpChannels;
    __syncthreads();
    for (int i = threadIdx.x; i < here * kTaps * B; i += kThreads) {
      const int b = i % B, tap = i / B % kTaps, a = i / B / kTaps;
      shared[a][tap][b] =
          b < map.big_channels ? weight[weight_index(map, first + a, tap, b)] : 0.0f;
    }
    __syncthreads();
    if (!mine) continue;
    for (int a = 0; a < here; a += N) {
      float values[4][N];
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const int row = y - 1 + s / 2, column = x - 1 + s % 2;
        if (row >= 0 && row < map.height && column >= 0 && column < map.width) {
          const int64_t at =
              ((image * map.height + row) * map.width + column) * map.small_channels + first + a;
          load_gated(small, gate, at, values[s]);
        } else {
#pragma unroll
          for (int k = 0; k < N; ++k) values[s][k] = 0.0f;
        }
      }
#pragma unroll
      for (int k = 0; k < N; ++k) {
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
          const int i = tap / 4, j = tap % 4;
          const int s = 2 * (1 - i / 2) + (1 - j / 2), pixel = 2 * (i % 2) + j % 2;
#pragma unroll
          for (int b = 0; b < B; ++b) {
            sums[pixel][b] = fmaf(values[s][k], shared[a + k][tap][b], sums[pixel][b]);
          }
        }
      }
    }
  }
  if (!mine) return;
#pragma unroll
  for (int pixel = 0; pixel < 4; ++pixel) {
    const int p = 2 * y - 1 + pixel / 2, q = 2 * x - 1 + pixel % 2;
    if (p < 0 || p >= map.big_height || q < 0 || q >= map.big_width) continue;
    T* out = big + ((image * map.big_height + p) * map.big_width + q) * map.big_channels;
#pragma unroll
    for (int b = 0; b < B; ++b) {
      if (b < map.big_channels) out[b] = from_float<T>(activate(activation, sums[pixel][b], 0.0f));
    }
  }
}

// partial [blocks, taps, B, small channels]
template <class T, int B>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    weight_grad_kernel(float* partial, const T* small, Gate gate, const T* big, Map map) {
  alignas(16) __shared__ float shared[kBigHeight][kBigWidth][B];
  __shared__ float reduced[kGradTaps][kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int a = blockIdx.y * kWarp + lane;
  const bool mine = a < map.small_channels;
  float sums[kTaps * B];
#pragma unroll
  for (int tap = 0; tap < kTaps * B; ++tap) sums[tap] = 0.0f;
  for (int64_t tile = blockIdx.x; tile < map.tiles; tile += gridDim.x) {
    const TileAt at = tile_at(map, tile);
    __syncthreads();
    stage<T, B>(shared, big, map, at);
    __syncthreads();
    for (int position = warp; position < kTilePositions; position += kWarps) {
      const int row = position / kTileWidth, column = position % kTileWidth;
      const int y = at.y + row, x = at.x + column;
      if (!mine || y >= map.height || x >= map.width) continue;
      float value[1];
      load_gated(small, gate,
                 ((at.image * map.height + y) * map.width + x) * map.small_channels + a, value);
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
        for (int b = 0; b < B; ++b) {
          sums[tap * B + b] =
              fmaf(shared[2 * row + tap / 4][2 * column + tap % 4][b], value[0], sums[tap * B + b]);
        }
      }
    }
  }
#pragma unroll
  for (int first = 0; first < kTaps * B; first += kGradTaps) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kGradTaps; ++k) reduced[k][warp][lane] = sums[first + k];
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += reduced[warp][w][lane];
    if (mine) {
      partial[(static_cast<int64_t>(blockIdx.x) * kTaps * B + first + warp) * map.small_channels +
              a] = sum;
    }
  }
}

// 32 small channels a block, one tap and big channel (axis 1); its warps share the partial sums.
__global__ void __launch_bounds__(kThreads)
    weight_grad_sum_kernel(float* dweight, const float* partial, Map map, int padded, int blocks) {
  __shared__ float shared[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int a = blockIdx.x * kWarp + lane, tap = blockIdx.y / padded, b = blockIdx.y % padded;
  const int64_t step = static_cast<int64_t>(kTaps) * padded * map.small_channels;
  float sum = 0.0f;
  if (a < map.small_channels) {
    for (int k = warp; k < blocks; k += kWarps) {
      sum += partial[k * step + static_cast<int64_t>(blockIdx.y) * map.small_channels + a];
    }
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || a >= map.small_channels || b >= map.big_channels) return;
  for (int w = 1; w < kWarps; ++w) sum += shared[w][lane];
  dweight[weight_index(map, a, tap, b)] = sum;
}

Status check(const StridedConvShape& s) {
  const auto doubles = [](int64_t big, int64_t small) {
    return big == 2 * small || big == 2 * small + 1;
  };
  constexpr int64_t most = 1 << 24;  // positions of an image and corners are int
  if (s.batch < 1 || s.height < 1 || s.width < 1 || s.small_channels < 1 || s.batch > most ||
      s.height > most || s.width > most || s.small_channels > kMaxGridY * kWarp ||
      !doubles(s.big_height, s.height) || !doubles(s.big_width, s.width)) {
    return Status::bad_size;
  }
  if (!known(s.dtype) || !known(s.weight_layout)) return Status::bad_enum;
  return s.big_channels >= 1 && s.big_channels <= 4 ? Status::ok : Status::no_method;
}

Map map_of(const StridedConvShape& s) {
  Map map{s.batch,
          static_cast<int>(s.height),
          static_cast<int>(s.width),
          static_cast<int>(s.big_height),
          static_cast<int>(s.big_width),
          static_cast<int>(s.small_channels),
          static_cast<int>(s.big_channels),
          static_cast<int>(div_up(s.height, kTileHeight)),
          static_cast<int>(div_up(s.width, kTileWidth)),
          0,
          s.weight_layout == Layout::channels_last};
  map.tiles = s.batch * map.tiles_down * map.tiles_across;
  return map;
}

// Big channels that kernels are compiled for; 2 run as 3.
int padded(const StridedConvShape& s) {
  return s.big_channels == 2 ? 3 : static_cast<int>(s.big_channels);
}

unsigned channel_blocks(const StridedConvShape& s) {
  return static_cast<unsigned>(div_up(s.small_channels, kWarp));
}

int64_t grad_blocks(const Map& map) { return map.tiles < kGradBlocks ? map.tiles : kGradBlocks; }

// Calls body with the element type and with the padded big channels, as types.
template <class Body>
void with_channels(const StridedConvShape& s, const Body& body) {
  with_type(s.dtype, [&](auto* type) {
    switch (padded(s)) {
      case 1:
        return body(type, std::integral_constant<int, 1>{});
      case 3:
        return body(type, std::integral_constant<int, 3>{});
      default:
        return body(type, std::integral_constant<int, 4>{});
    }
  });
}

}  // namespace

int64_t image_conv_scratch(const StridedConvShape& s) {
  if (check(s) != Status::ok) return 1;
  return grad_blocks(map_of(s)) * kTaps * padded(s) * s.small_channels;
}

Outcome image_conv_down(const ImageConvDown& args, Stream stream) {
  const StridedConvShape& s = args.shape;
  if (const Status status = check(s); status != Status::ok) return {status};
  if (!known(args.activation)) return {Status::bad_enum};
  if (!args.big || !args.weight || !args.small) return {Status::bad_pointer};
  const Map map = map_of(s);
  const int64_t blocks = map.tiles < kMaxTileBlocks ? map.tiles : kMaxTileBlocks;
  with_channels(s, [&](auto* type, auto channels) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch(down_kernel<T, decltype(channels)::value>,
           dim3(static_cast<unsigned>(blocks), channel_blocks(s)), kThreads, stream,
           static_cast<T*>(args.small), static_cast<const T*>(args.big), args.weight, args.bias,
           map, args.activation, args.negative_slope);
  });
  return launched();
}

Outcome image_conv_up(const ImageConvUp& args, Stream stream) {
  const StridedConvShape& s = args.shape;
  if (const Status status = check(s); status != Status::ok) return {status};
  if (!known(args.activation) || args.activation == Activation::leaky_relu) {
    return {Status::bad_enum};
  }
  if (!args.big || !args.weight || !args.small) return {Status::bad_pointer};
  const Map map = map_of(s);
  const int64_t blocks = div_up(s.batch * (s.height + 1) * (s.width + 1), kThreads);
  if (blocks > 0x7fffffff) return {Status::bad_size};
  with_channels(s, [&](auto* type, auto channels) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int B = decltype(channels)::value;
    const bool packs =
        s.small_channels % kPack<T> == 0 && aligned(args.small) && aligned(args.gate);
    launch(packs ? up_kernel<T, B, kPack<T>> : up_kernel<T, B, 1>,
           dim3(static_cast<unsigned>(blocks)), kThreads, stream, static_cast<T*>(args.big),
           static_cast<const T*>(args.small), Gate{args.gate, args.negative_slope}, args.weight,
           args.bias, map, args.activation);
  });
  return launched();
}

Outcome image_conv_weight_grad(const ImageConvWeightGrad& args, Stream stream) {
  const StridedConvShape& s = args.shape;
  if (const Status status = check(s); status != Status::ok) return {status};
  if (!args.big || !args.small || !args.dweight || !args.scratch) return {Status::bad_pointer};
  const Map map = map_of(s);
  const unsigned blocks = static_cast<unsigned>(grad_blocks(map));
  with_channels(s, [&](auto* type, auto channels) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int B = decltype(channels)::value;
    launch(weight_grad_kernel<T, B>, dim3(blocks, channel_blocks(s)), kThreads, stream,
           args.scratch, static_cast<const T*>(args.small), Gate{args.gate, args.negative_slope},
           static_cast<const T*>(args.big), map);
    launch(weight_grad_sum_kernel, dim3(channel_blocks(s), kTaps * B), kThreads, stream,
           args.dweight, args.scratch, map, B, static_cast<int>(blocks));
  });
  return launched();
}

}  // namespace pygan::cuda
