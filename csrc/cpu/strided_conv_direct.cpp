// strided_conv for images: 1 to 4 big channels. All passes are matrix products whose odd side, the
// 16 taps of each big channel, stays in the first-level cache, so that the small map, read or
// written once, is all that memory sees.
//
// up: a row of small times the weights gives every pixel's part in the 4x4 big pixels around it.
// The parts for a row's two upper big rows start from those that the row above has for the same
// two, so that only neighbours in a row are left to be added.
// down: the big rows around small ones, padded, are the left side as they lie. In tiles of 2x2
// outputs 9 products stand for 16; not where the registers hold too few sums for that, nor where
// bfloat16 is multiplied itself, for differences would have to be rounded.
// weight_grad: the padded rows, read by columns, times the small rows, in tiles as well.

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/strided_conv.h"

namespace pygan::PYGAN_ISA_NS {
namespace {

constexpr int64_t kMostBigChannels = 4;
constexpr int64_t kMostSmallChannels = 4096;
constexpr int64_t kSerialWork = 1 << 20;  // products; below this a second thread costs too much
constexpr int kRowStep = kBlockRows / 3;  // blocks have one, two or three times as many rows
constexpr int kTiles = 4;                 // of 2x2 outputs a block
constexpr int64_t kChunkTiles = 2;        // rows of tiles
constexpr int64_t kChunkRows = 4;         // small rows whose products are summed in registers
constexpr int64_t kCacheLine = 64;
constexpr int kPoints = 3;  // products in place of the four of two outputs with two taps

template <int Value>
using Int = std::integral_constant<int, Value>;

bool pairs(const StridedConvShape& s) { return kHasPairs && s.dtype == DType::bf16; }

// Rows of the small map are dealt out in equal shares, one a thread.
int64_t small_rows(const StridedConvShape& s) { return s.batch * s.height; }
int64_t share_count(const StridedConvShape& s) {
  const int64_t work = small_rows(s) * s.width * s.small_channels * s.big_channels * 16;
  return work < kSerialWork ? 1 : std::min<int64_t>(s.threads, small_rows(s));
}

// Sizes in floats, whole cache lines.
struct Scratch {
  int64_t weights;           // packed, for all
  int64_t sums, big, small;  // of each share

  int64_t share() const { return sums + big + small; }
  int64_t bytes(int64_t shares) const { return (weights + shares * share()) * 4; }
};

// Big pixels -1 to 2 width of a row, and those that only rows beyond the last block's end read.
int64_t padded_row(const StridedConvShape& s) {
  return round_up((2 * round_up(s.width, 2 * kTiles) + 2) * s.big_channels, 16);
}

Scratch plan(const StridedConvShape& s, ConvPass pass) {
  const int64_t columns = 16 * s.big_channels, pixels = round_up(s.width, kRowStep);
  const int64_t channels = round_up(s.small_channels, 16);
  const int64_t words = pairs(s) ? (s.small_channels + 1) / 2 : s.small_channels;
  switch (pass) {
    case ConvPass::up:
      return {words * columns, (pixels + 3) * columns, padded_row(s) + 32,
              round_up(pixels * words, 16)};
    case ConvPass::down:
      if (Vec::width == 16 && !pairs(s)) {
        return {channels * kPoints * kPoints * 4 * s.big_channels, 0, 12 * padded_row(s), 0};
      }
      return {channels * columns, 0, 4 * padded_row(s), 0};
    case ConvPass::weight_grad:
      if (!pairs(s)) {
        return {
            0, kPoints * kPoints * 4 * s.big_channels * channels,
            kChunkTiles * 4 * kPoints * padded_row(s),
            kChunkTiles * (pixels + 2) * (kPoints * kPoints * kBlockColumns / 2 + 2 * channels)};
      }
      return {0, channels * columns, (2 * kChunkRows + 3) * padded_row(s),
              kChunkRows * pixels * channels};
  }
  return {};
}

// The weights by small channel and column (i, j, b) of theirs.
class Taps {
 public:
  explicit Taps(const StridedConvShape& s)
      : channels_(s.small_channels), columns_(16 * s.big_channels) {
    const int64_t B = s.big_channels;
    const bool last = s.weight_layout == Layout::channels_last;
    for (int64_t n = 0; n < columns_; ++n) offset_[n] = last ? n : n % B * 16 + n / B;
  }
  int64_t index(int64_t a, int64_t column) const { return a * columns_ + offset_[column]; }
  float at(const float* weight, int64_t a, int64_t column) const {
    return a < channels_ ? weight[index(a, column)] : 0.0f;
  }

 private:
  int64_t channels_, columns_, offset_[16 * kMostBigChannels];
};

// A vector of words: value(depth, lane), in pairs of depths 0 and 1.
template <bool Pairs, class Value>
void pack(float* to, const Value& value) {
  float even[Vec::width], odd[Vec::width];
  for (int lane = 0; lane < Vec::width; ++lane) {
    even[lane] = value(0, lane);
    if constexpr (Pairs) odd[lane] = value(1, lane);
  }
  if constexpr (Pairs) {
    store(to, pair_up(load(even), load(odd)));
  } else {
    store(to, load(even));
  }
}

template <class T>
void widen_row(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + Vec::width <= count; i += Vec::width) store(to + i, load(from + i));
  const int rest = static_cast<int>(count - i);
  if (rest > 0) store(to + i, load(from + i, rest), rest);
}

template <class T>
inline void store_lanes(T* to, Vec value, int lanes) {
  lanes == Vec::width ? store(to, value) : store(to, value, lanes);
}

// Into the second-level cache: the first is full of what is used over and over.
inline void prefetch(const void* from, int64_t bytes) {
  const char* line = static_cast<const char*>(from);
  for (const char* end = line + bytes; line < end; line += kCacheLine) {
    __builtin_prefetch(line, 0, 2);
  }
}

// The small map as it counts. Where it has a gate or is normalized, a copy of it is multiplied.
template <class T>
class Small {
 public:
  template <class Args>
  explicit Small(const Args& args)
      : values_(static_cast<const T*>(args.small)),
        gate_(static_cast<const T*>(args.gate)),
        norm_(norm_of(args)),
        channels_(args.shape.small_channels),
        image_(args.shape.height * args.shape.width * channels_),
        slope_(args.negative_slope) {}

  bool as_it_is() const { return !gate_ && !norm_; }
  const T* values() const { return values_; }

  // Channels from `a` on of the pixel that begins at value `pixel`, of an image with this norm.
  const float* norm_at(int64_t pixel) const { return norm_.of_image(pixel / image_); }
  Vec value(const float* norm, int64_t pixel, int64_t a, int lanes) const {
    const auto read = [lanes](const auto* p) {
      return lanes == Vec::width ? load(p) : load(p, lanes);
    };
    const Vec value = read(values_ + pixel + a);
    if (norm) return norm_.at(norm, a, read)(value);
    return if_positive(read(gate_ + pixel + a), value, value * slope_);
  }

  void prefetch(int64_t i, int64_t count) const {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    PYGAN_ISA_NS::prefetch(values_ + i, bytes);
    if (gate_) PYGAN_ISA_NS::prefetch(gate_ + i, bytes);
  }

  // Whole pixels of an image, `count` values from i on, rounded to T where To is.
  template <class To>
  void copy(int64_t i, int64_t count, To* to) const {
    if (as_it_is()) {
      if constexpr (std::is_same_v<To, float>) {
        widen_row(values_ + i, count, to);
      } else {
        std::memcpy(to, values_ + i, count * sizeof(T));
      }
      return;
    }
    const float* norm = norm_at(i);
    for (int64_t k = 0; k < count; k += channels_) {
      for (int64_t a = 0; a < channels_; a += Vec::width) {
        const int lanes = static_cast<int>(std::min<int64_t>(Vec::width, channels_ - a));
        store_lanes(to + k + a, value(norm, i + k, a, lanes), lanes);
      }
    }
  }

 private:
  const T* values_;
  const T* gate_;
  MapNorm norm_;
  int64_t channels_, image_;
  Vec slope_;
};

// Cuts rows into blocks of at most Most steps: body(first row, number of rows as a type).
// The last block may reach beyond the end.
template <int Most, class Body>
void for_each_block(int64_t rows, const Body& body) {
  for (int64_t row = 0; row < rows;) {
    const int64_t steps = (rows - row + kRowStep - 1) / kRowStep;
    if (Most == 3 && steps >= 3 && steps != 4) {
      body(row, Int<Most * kRowStep>{});
      row += Most * kRowStep;
    } else if (steps >= 2) {
      body(row, Int<2 * kRowStep>{});
      row += 2 * kRowStep;
    } else {
      body(row, Int<kRowStep>{});
      row += kRowStep;
    }
  }
}

// body(first channel, number of vectors as a type) for blocks of channels.
template <class Body>
void for_each_channel_block(int64_t channels, const Body& body) {
  for (int64_t a = 0; a < channels; a += kBlockColumns) {
    if (channels - a > Vec::width) {
      body(a, Int<2>{});
    } else {
      body(a, Int<1>{});
    }
  }
}

template <class Body>
void for_each_share(const StridedConvShape& s, int64_t rows, const Body& body) {
  const int64_t shares = share_count(s);
  parallel_for(s.threads, shares, [&](int64_t share) {
    body(share, rows * share / shares, rows * (share + 1) / shares);
  });
}

// up

template <int B>
struct UpBlocks {
  static constexpr int columns = 16 * B;
  static constexpr int vectors = Vec::width == 8 ? 2 : B == 4 ? 2 : B;
  static constexpr int count = columns / Vec::width / vectors;
  static constexpr int most_steps = vectors == 3 ? 2 : 3;
};

// What a row's pixel adds its products to: the upper half of the same pixel in the row above.
template <int B>
inline Vec carried(const float* sums, int column) {
  const int count = 8 * B - column;
  if (count <= 0) return Vec(0.0f);
  const Vec value = load(sums + column + 8 * B);
  return count < Vec::width ? keep(value, count) : value;
}

// prefetch(x, count) is called once for every pixel.
template <bool Pairs, int B, class Prefetch>
void multiply_row(const float* small, int64_t words, int64_t pixels, const float* weights,
                  float* sums, const Prefetch& prefetch) {
  using Blocks = UpBlocks<B>;
  constexpr int kColumns = Blocks::vectors * Vec::width;
  for_each_block<Blocks::most_steps>(pixels, [&](int64_t x, auto rows) {
    constexpr int kRows = decltype(rows)::value;
    prefetch(x, kRows);
    for (int block = 0; block < Blocks::count; ++block) {
      float* out = sums + x * Blocks::columns + block * kColumns;
      Vec acc[kRows][Blocks::vectors];
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < Blocks::vectors; ++j) {
          acc[i][j] =
              carried<B>(sums + (x + i) * Blocks::columns, block * kColumns + j * Vec::width);
        }
      }
      accumulate<Pairs>(acc, small + x * words, words, weights + block * words * kColumns, kColumns,
                        words);
      store_block(out, Blocks::columns, acc);
    }
  });
}

// A big row from the part of each pixel's sums that belongs to it.
template <int B, class T>
void write_big_row(const float* sums, int64_t width, int64_t big_width, Vec bias, float* line,
                   T* big) {
  for (int64_t x = 0; x <= width; ++x) {
    const float* here = sums + x * 16 * B;
    store(line + x * 2 * B, load(here) + load(here - 14 * B) + bias);
  }
  line += B;
  int64_t i = 0;
  for (; i + Vec::width <= big_width * B; i += Vec::width) store(big + i, load(line + i));
  const int rest = static_cast<int>(big_width * B - i);
  if (rest > 0) store(big + i, load(line + i), rest);
}

template <class T, int B>
void up(const StridedConvUp& args) {
  using Blocks = UpBlocks<B>;
  constexpr bool kPair = kPairs<T>;
  const StridedConvShape& s = args.shape;
  const int64_t H = s.height, W = s.width, A = s.small_channels;
  const int64_t words = kPair ? (A + 1) / 2 : A;
  const Scratch scratch = plan(s, ConvPass::up);
  float* weights = static_cast<float*>(args.scratch);
  float* shares = weights + scratch.weights;

  const Taps taps(s);
  float* to = weights;
  for (int block = 0; block < Blocks::count; ++block) {
    for (int64_t k = 0; k < words; ++k) {
      for (int j = 0; j < Blocks::vectors; ++j, to += Vec::width) {
        pack<kPair>(to, [&](int64_t depth, int lane) {
          return taps.at(args.weight, (kPair ? 2 * k : k) + depth,
                         (block * Blocks::vectors + j) * Vec::width + lane);
        });
      }
    }
  }
  float bias_lanes[Vec::width] = {};
  for (int lane = 0; args.bias && lane < 2 * B; ++lane) bias_lanes[lane] = args.bias[lane % B];
  const Vec bias = load(bias_lanes);

  // Rows are multiplied where they lie, if they consist of whole words and whole blocks.
  const Small<T> small(args);
  const bool in_place =
      small.as_it_is() && (std::is_same_v<T, float> || (kPair && A % 2 == 0)) && W % kRowStep == 0;
  for_each_share(s, small_rows(s), [&](int64_t share, int64_t begin, int64_t end) {
    float* sums = shares + share * scratch.share();
    float* line = sums + scratch.sums;
    float* copy = line + scratch.big;
    std::memset(sums, 0, scratch.share() * sizeof(float));
    sums += Blocks::columns;  // a pixel of zeros before the row, another one behind it
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / H, y = row % H;
      if (y == 0) std::fill_n(sums, W * Blocks::columns, 0.0f);
      const auto multiply = [&](int64_t from) {
        const float* left = reinterpret_cast<const float*>(small.values() + from * W * A);
        if (!in_place) {
          using Copied = std::conditional_t<kPair, bfloat16, float>;
          left = copy;
          const int64_t step = kPair && A % 2 != 0 ? 1 : W;
          for (int64_t x = 0; x < W; x += step) {
            small.copy((from * W + x) * A, step * A, reinterpret_cast<Copied*>(copy + x * words));
          }
        }
        multiply_row<kPair, B>(left, words, W, weights, sums, [&](int64_t x, int64_t count) {
          small.prefetch(((from + 1) * W + x) * A, count * A);
        });
        std::fill_n(sums + W * Blocks::columns, Blocks::columns, 0.0f);
      };
      const auto write = [&](int64_t big_row, int slice) {
        if (big_row < 0 || big_row >= s.big_height) return;
        T* big = static_cast<T*>(args.big) + (n * s.big_height + big_row) * s.big_width * B;
        write_big_row<B>(sums + slice * 4 * B, W, s.big_width, bias, line, big);
      };
      if (row == begin && y > 0) multiply(row - 1);
      multiply(row);
      write(2 * y - 1, 0);
      write(2 * y, 1);
      if (y == H - 1) {
        write(2 * y + 1, 2);
        write(2 * y + 2, 3);
      }
    }
  });
}

// down and weight_grad

// Row p of a big image, with a pixel of zeros before it and zeros behind it, to `row`, which has
// held zeros or other rows alone.
template <bool Pairs, class T>
void pad_row(const StridedConvShape& s, const T* image, int64_t p, float* row) {
  const int64_t B = s.big_channels, values = s.big_width * B;
  if (p < 0 || p >= s.big_height) {
    std::memset(row, 0, padded_row(s) * sizeof(float));
  } else if constexpr (Pairs) {
    std::memcpy(reinterpret_cast<char*>(row) + B * sizeof(T), image + p * values,
                values * sizeof(T));
  } else {
    widen_row(image + p * values, values, row + B);
  }
}

// The channels of small that a block of vectors is stored to.
template <int Vectors>
struct Outputs {
  Vec bias[Vectors];
  int lanes[Vectors];
  Activation activation;
  Vec slope;

  Outputs(const StridedConvDown& args, int64_t a)
      : activation(args.activation), slope(args.negative_slope) {
    for (int j = 0; j < Vectors; ++j, a += Vec::width) {
      lanes[j] = static_cast<int>(std::min<int64_t>(Vec::width, args.shape.small_channels - a));
      bias[j] = args.bias ? load(args.bias + a, lanes[j]) : Vec(0.0f);
    }
  }

  Vec activate(Vec z) const {
    if (activation == Activation::none) return z;
    return activation == Activation::relu ? max(Vec(0.0f), z) : if_positive(z, z, z * slope);
  }
};

template <class T, int B>
void down_by_rows(const StridedConvDown& args) {
  constexpr bool kPair = kPairs<T>;
  constexpr int64_t kStep = kPair ? B : 2 * B, kDepth = 2 * kStep;  // words
  const StridedConvShape& s = args.shape;
  const int64_t H = s.height, W = s.width, A = s.small_channels;
  const Scratch scratch = plan(s, ConvPass::down);
  float* weights = static_cast<float*>(args.scratch);
  float* shares = weights + scratch.weights;

  const Taps taps(s);
  float* to = weights;
  for_each_channel_block(A, [&](int64_t a, auto vectors) {
    for (int64_t k = 0; k < 4 * kDepth; ++k) {
      for (int j = 0; j < decltype(vectors)::value; ++j, to += Vec::width) {
        pack<kPair>(to, [&](int64_t second, int lane) {
          return taps.at(args.weight, a + j * Vec::width + lane, (kPair ? 2 * k : k) + second);
        });
      }
    }
  });

  for_each_share(s, small_rows(s), [&](int64_t share, int64_t begin, int64_t end) {
    float* rows = shares + share * scratch.share();
    const int64_t row_size = padded_row(s);
    std::memset(rows, 0, scratch.share() * sizeof(float));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / H, y = row % H;
      const T* image = static_cast<const T*>(args.big) + n * s.big_height * s.big_width * B;
      T* small = static_cast<T*>(args.small) + row * W * A;
      for (int64_t i = row == begin || y == 0 ? 0 : 2; i < 4; ++i) {
        pad_row<kPair>(s, image, 2 * y - 1 + i, rows + (2 * y + i) % 4 * row_size);
      }
      for_each_channel_block(A, [&](int64_t a, auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        const Outputs<kVectors> outputs(args, a);
        for_each_block<3>(W, [&](int64_t x, auto block_rows) {
          constexpr int kRows = decltype(block_rows)::value;
          Vec acc[kRows][kVectors];
#pragma GCC unroll 16
          for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) acc[i][j] = outputs.bias[j];
          }
          for (int64_t i = 0; i < 4; ++i) {
            accumulate<kPair>(acc, rows + (2 * y + i) % 4 * row_size + x * kStep, kStep,
                              weights + a * 4 * kDepth + i * kDepth * kVectors * Vec::width,
                              kVectors * Vec::width, kDepth);
          }
          T* out = small + x * A + a;
#pragma GCC unroll 16
          for (int i = 0; i < kRows; ++i) {
            if (x + i >= W) break;
            prefetch(out + (W + i) * A, kVectors * Vec::width * sizeof(T));
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) {
              store_lanes(out + i * A + j * Vec::width, outputs.activate(acc[i][j]),
                          outputs.lanes[j]);
            }
          }
        });
      });
    }
  });
}

// What taps 0 and 1 weigh in each point's factor.
constexpr float kPointTaps[kPoints][2] = {{1, 0}, {1, 1}, {0, -1}};

// Two outputs d0 g0 + d1 g1 and d1 g0 + d2 g1 are m0 + m1 and m1 + m2 with m0 = (d0 - d1) g0,
// m1 = d1 (g0 + g1) and m2 = (d1 - d2) (-g1), here of even and of odd rows and columns at once.
// The lines of the big rows below 2 y - 1 hold the factors of d: [point][parity] along the rows,
// where the middle one along the columns is read, then the same with differences of neighbours.
template <class T>
void fill_tile_lines(const StridedConvShape& s, const T* image, int64_t y, float* lines) {
  const int64_t line = padded_row(s), differences = 2 * kPoints * line;
  for (int64_t i = 0; i < 2 * kPoints; ++i) {
    pad_row<false>(s, image, 2 * y - 1 + i, lines + i * line);
  }
  for (int64_t i = 0; i < 2 * line; i += Vec::width) {
    const Vec middle = load(lines + 2 * line + i);
    store(lines + i, load(lines + i) - middle);
    store(lines + 4 * line + i, middle - load(lines + 4 * line + i));
  }
  for (int64_t i = 0; i < differences; i += Vec::width) {
    store(lines + differences + i, load(lines + i) - load(lines + i + 2 * s.big_channels));
  }
}

template <class T, int B>
void down_by_tiles(const StridedConvDown& args) {
  const StridedConvShape& s = args.shape;
  const int64_t H = s.height, W = s.width, A = s.small_channels;
  constexpr int64_t kDepth = 2 * B;  // an even and an odd pixel
  const Scratch scratch = plan(s, ConvPass::down);
  float* weights = static_cast<float*>(args.scratch);  // [block][column][row][parity][depth]
  float* shares = weights + scratch.weights;

  const Taps taps(s);
  float* to = weights;
  for_each_channel_block(A, [&](int64_t a, auto vectors) {
    for (int k = 0; k < kPoints * kPoints * 4 * B; ++k) {
      const int column = k / (kPoints * 4 * B), row = k / (4 * B) % kPoints;
      const int top = k / (2 * B) % 2, left = k / B % 2, b = k % B;
      for (int j = 0; j < decltype(vectors)::value; ++j, to += Vec::width) {
        pack<false>(to, [&](int64_t, int lane) {
          float sum = 0.0f;
          for (int u = 0; u < 2; ++u) {
            for (int v = 0; v < 2; ++v) {
              const float share = kPointTaps[row][u] * kPointTaps[column][v];
              if (share == 0.0f) continue;
              sum += share * taps.at(args.weight, a + j * Vec::width + lane,
                                     ((2 * u + top) * 4 + 2 * v + left) * B + b);
            }
          }
          return sum;
        });
      }
    }
  });

  const int64_t tile_rows = (H + 1) / 2;
  for_each_share(s, s.batch * tile_rows, [&](int64_t share, int64_t begin, int64_t end) {
    float* lines = shares + share * scratch.share();  // [point][parity], values, then differences
    const int64_t line = padded_row(s), differences = kPoints * 2 * line;
    std::memset(lines, 0, scratch.share() * sizeof(float));
    for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
      const int64_t n = tile_row / tile_rows, y = tile_row % tile_rows * 2;
      const T* image = static_cast<const T*>(args.big) + n * s.big_height * s.big_width * B;
      T* small = static_cast<T*>(args.small) + (n * H + y) * W * A;
      fill_tile_lines(s, image, y, lines);
      for_each_channel_block(A, [&](int64_t a, auto vectors) {
        constexpr int kVectors = decltype(vectors)::value, kColumns = kVectors * Vec::width;
        const float* block = weights + a * kPoints * kPoints * 4 * B;
        const Outputs<kVectors> outputs(args, a);
        for (int64_t x = 0; x < W; x += 2 * kTiles) {
          const auto multiply = [&](Vec(&sums)[kPoints][kTiles][kVectors], int column,
                                    const float* left) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int i = 0; i < kPoints; ++i) {
#pragma GCC unroll 2
              for (int parity = 0; parity < 2; ++parity) {
                accumulate<false>(sums[i], left + (2 * i + parity) * line, 4 * B,
                                  block + ((column * kPoints + i) * 2 + parity) * kDepth * kColumns,
                                  kColumns, kDepth);
              }
            }
          };
          const auto each = [&](const auto& body) __attribute__((always_inline)) {
#pragma GCC unroll 16
            for (int i = 0; i < kTiles; ++i) {
#pragma GCC unroll 4
              for (int j = 0; j < kVectors; ++j) body(i, j);
            }
          };
          const float* left = lines + x * kDepth;
          Vec sums[kPoints][kTiles][kVectors], shared[2][kTiles][kVectors];
          each([&](int i, int j) {
            sums[0][i][j] = sums[2][i][j] = Vec(0.0f);
            sums[1][i][j] = outputs.bias[j];
          });
          multiply(sums, 1, left + kDepth);
          each([&](int i, int j) {
            shared[0][i][j] = sums[0][i][j] + sums[1][i][j];
            shared[1][i][j] = sums[1][i][j] + sums[2][i][j];
          });
          for (int side = 0; side < 2; ++side) {
            each([&](int i, int j) {
              sums[0][i][j] = shared[0][i][j];
              sums[1][i][j] = Vec(0.0f);
              sums[2][i][j] = shared[1][i][j];
            });
            multiply(sums, 2 * side, left + differences + side * kDepth);
            T* out = small + (x + side) * A + a;
            each([&](int i, int j) {
              if (x + 2 * i + side >= W) return;
              T* at = out + 2 * i * A + j * Vec::width;
              prefetch(at + 2 * W * A, Vec::width * sizeof(T));  // below this tile
              store_lanes(at, outputs.activate(sums[0][i][j] + sums[1][i][j]), outputs.lanes[j]);
              if (y + 1 < H) {
                store_lanes(at + W * A, outputs.activate(sums[1][i][j] + sums[2][i][j]),
                            outputs.lanes[j]);
              }
            });
          }
        }
      });
    }
  });
}

// Adds the sums of all shares up in those of the first.
void add_shares(const StridedConvShape& s, const Scratch& scratch, float* shares) {
  for (int64_t share = 1; share < share_count(s); ++share) {
    const float* sums = shares + share * scratch.share();
    for (int64_t i = 0; i < scratch.sums; i += Vec::width) {
      store(shares + i, load(shares + i) + load(sums + i));
    }
  }
}

template <int Rows, int Vectors>
inline void add_to(float* sums, int64_t row, const Vec (&acc)[Rows][Vectors]) {
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      float* at = sums + i * row + j * Vec::width;
      store(at, load(at) + acc[i][j]);
    }
  }
}

inline float word(bfloat16 first, bfloat16 second) {
  return std::bit_cast<float>(first.bits | static_cast<uint32_t>(second.bits) << 16);
}

// In words of two bfloat16, of neighbours in a row.
template <int B>
void weight_grad_by_rows(const StridedConvWeightGrad& args) {
  const StridedConvShape& s = args.shape;
  const int64_t H = s.height, W = s.width, A = s.small_channels;
  const int64_t channels = round_up(A, 16), depth = (W + 1) / 2, line = padded_row(s);
  const Scratch scratch = plan(s, ConvPass::weight_grad);
  float* shares = static_cast<float*>(args.scratch);
  const Small<bfloat16> small(args);

  for_each_share(s, small_rows(s), [&](int64_t share, int64_t begin, int64_t end) {
    float* sums = shares + share * scratch.share();  // [columns][channels]
    float* padded = sums + scratch.sums;
    float* lines = padded + line;
    float* right = sums + scratch.sums + scratch.big;
    std::memset(sums, 0, scratch.share() * sizeof(float));
    for (int64_t row = begin; row < end;) {
      const int64_t n = row / H, y = row % H;
      const int64_t count = std::min({kChunkRows, end - row, H - y});
      const bfloat16* image =
          static_cast<const bfloat16*>(args.big) + n * s.big_height * s.big_width * B;
      const int64_t first = row * W * A;
      for (int64_t i = 0; i < 2 * count + 2; ++i) {
        pad_row<true>(s, image, 2 * y - 1 + i, padded);
        const bfloat16* values = reinterpret_cast<const bfloat16*>(padded);
        float* to = lines + i * line;
        for (int64_t k = 0; k < depth * 4 * B; ++k) to[k] = word(values[k], values[k + 2 * B]);
        for (int64_t k = W / 2 * 4 * B; k < depth * 4 * B; ++k) to[k] = word(values[k], {});
      }
      const float* norm = small.norm_at(first);
      for (int64_t k = 0; k < count * depth; ++k) {
        const int64_t x = k % depth * 2;
        const int64_t pixel = first + (k / depth * W + x) * A;
        const bfloat16* values = small.values() + pixel;
        float* to = right + k * channels;
        if (!small.as_it_is()) {
          for (int64_t a = 0; a < A; a += Vec::width) {
            const int lanes = static_cast<int>(std::min<int64_t>(Vec::width, A - a));
            const Vec second = x + 1 < W ? small.value(norm, pixel + A, a, lanes) : Vec(0.0f);
            store(to + a, pair_up(small.value(norm, pixel, a, lanes), second));
          }
        } else if (x + 1 < W) {
          for (int64_t a = 0; a < A; ++a) to[a] = word(values[a], values[A + a]);
        } else {
          for (int64_t a = 0; a < A; ++a) to[a] = word(values[a], {});
        }
      }
      const int64_t blocks = (A + kBlockColumns - 1) / kBlockColumns;
      int64_t next = first + count * W * A;
      for_each_channel_block(A, [&](int64_t a, auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        constexpr int kRows = B == 4 ? 8 : 4 * B;
        const int64_t part = count * W * A * kRows / (blocks * 16 * B);
        for (int64_t column = 0; column < 16 * B; column += kRows) {
          small.prefetch(std::exchange(next, next + part), part);
          const float* left = lines + column / (4 * B) * line + column % (4 * B);
          Vec acc[kRows][kVectors];
          clear(acc);
          for (int64_t k = 0; k < count; ++k) {
            accumulate_columns<true>(acc, left + 2 * k * line, 4 * B,
                                     right + k * depth * channels + a, channels, depth);
          }
          add_to(sums + column * channels + a, channels, acc);
        }
      });
      row += count;
    }
  });

  add_shares(s, scratch, shares);
  const Taps taps(s);
  for (int64_t a = 0; a < A; ++a) {
    for (int64_t column = 0; column < 16 * B; ++column) {
      args.dweight[taps.index(a, column)] = shares[column * channels + a];
    }
  }
}

// Columns of the left side that one block of sums takes.
template <int B>
constexpr int kGradRows = Vec::width == 8 && B == 4 ? 4 : 2 * B;

// The gradients of down_by_tiles' g0 and g1: m0 + m1 and m1 - m2 with m0 = sum (d0 - d1) e0,
// m1 = sum d1 (e0 + e1) and m2 = sum (d1 - d2) e1.
template <class T, int B>
void weight_grad_by_tiles(const StridedConvWeightGrad& args) {
  const StridedConvShape& s = args.shape;
  const int64_t H = s.height, W = s.width, A = s.small_channels;
  const int64_t channels = round_up(A, 16), tiles = (W + 1) / 2, tile_rows = (H + 1) / 2;
  constexpr int64_t kDepth = 2 * B;
  const Scratch scratch = plan(s, ConvPass::weight_grad);
  float* shares = static_cast<float*>(args.scratch);
  const int64_t line = padded_row(s), differences = 2 * kPoints * line;
  const int64_t blocks = (A + kBlockColumns - 1) / kBlockColumns * kPoints * kPoints;
  const int64_t part = 2 * kChunkTiles * W * A / blocks;
  const Small<T> small(args);

  for_each_share(s, s.batch * tile_rows, [&](int64_t share, int64_t begin, int64_t end) {
    float* sums = shares + share * scratch.share();  // [row][column][parity][depth][channels]
    float* lines = sums + scratch.sums;
    float* added = lines + scratch.big;  // [tile row][row][column][tile][block of channels]
    float* copy = added + kChunkTiles * kPoints * kPoints * tiles * kBlockColumns;
    std::memset(sums, 0, scratch.share() * sizeof(float));
    for (int64_t tile_row = begin; tile_row < end;) {
      const int64_t n = tile_row / tile_rows, y = tile_row % tile_rows * 2;
      const int64_t count = std::min({kChunkTiles, end - tile_row, (H - y + 1) / 2});
      const T* image = static_cast<const T*>(args.big) + n * s.big_height * s.big_width * B;
      const int64_t first = (n * H + y) * W * A;
      for (int64_t r = 0; r < count; ++r) {
        fill_tile_lines(s, image, y + 2 * r, lines + r * 4 * kPoints * line);
      }
      const bool in_place = small.as_it_is() && std::is_same_v<T, float> && A % Vec::width == 0 &&
                            W % 2 == 0 && y + 2 * count <= H;
      const float* right = reinterpret_cast<const float*>(small.values() + first);
      int64_t next = first + 2 * count * W * A;
      const int64_t pixel = in_place ? A : channels, row = in_place ? W * A : 2 * tiles * channels;
      if (!in_place) {
        right = copy;
        for (int64_t i = 0; i < 2 * count; ++i) {
          if (y + i >= H) std::fill_n(copy + i * row, row, 0.0f);
          for (int64_t x = 0; x < W && y + i < H; ++x) {
            small.copy(first + (i * W + x) * A, A, copy + i * row + x * channels);
          }
        }
      }
      for_each_channel_block(A, [&](int64_t a, auto vectors) {
        constexpr int kVectors = decltype(vectors)::value, kColumns = kVectors * Vec::width;
        constexpr int kRows = kGradRows<B>;
        const int64_t plane = tiles * kColumns;
        for (int64_t t = 0; t < count * tiles; ++t) {
          const int64_t r = t / tiles, x = t % tiles;
          const float* top = right + 2 * r * row + 2 * x * pixel + a;
          float* to = added + r * kPoints * kPoints * plane + x * kColumns;
#pragma GCC unroll 4
          for (int j = 0; j < kColumns; j += Vec::width) {
            const Vec upper[2] = {load(top + j), load(top + pixel + j)};
            const Vec lower[2] = {load(top + row + j), load(top + row + pixel + j)};
            const Vec left = upper[0] + lower[0], other = upper[1] + lower[1];
            store(to + plane + j, upper[0] + upper[1]);
            store(to + 3 * plane + j, left);
            store(to + 4 * plane + j, left + other);
            store(to + 5 * plane + j, other);
            store(to + 7 * plane + j, lower[0] + lower[1]);
          }
        }
        for (int point = 0; point < kPoints * kPoints; ++point) {
          const int i = point / kPoints, column = point % kPoints;
          const bool is_added = i == 1 || column == 1;
          const float* factor =
              is_added ? added + point * plane : right + i / 2 * row + column / 2 * pixel + a;
          const int64_t factor_row = is_added ? kPoints * kPoints * plane : 2 * row;
          const int64_t factor_tile = is_added ? kColumns : 2 * pixel;
          const float* left =
              lines + 2 * i * line + (column == 1 ? 0 : differences) + (column == 0 ? 0 : kDepth);
          small.prefetch(std::exchange(next, next + part), part);
          for (int64_t k = 0; k < 2 * kDepth; k += kRows) {
            Vec acc[kRows][kVectors];
            clear(acc);
            for (int64_t r = 0; r < count; ++r) {
              accumulate_columns<false>(
                  acc, left + r * 4 * kPoints * line + k / kDepth * line + k % kDepth, 2 * kDepth,
                  factor + r * factor_row, factor_tile, tiles);
            }
            add_to(sums + (point * 2 * kDepth + k) * channels + a, channels, acc);
          }
        }
      });
      tile_row += count;
    }
  });

  add_shares(s, scratch, shares);
  const Taps taps(s);
  for (int64_t column = 0; column < 16 * B; ++column) {
    const int64_t i = column / (4 * B), j = column / B % 4, b = column % B;
    const int64_t u = i / 2, v = j / 2, k = (i % 2 * 2 + j % 2) * B + b;
    for (int64_t a = 0; a < A; ++a) {
      const auto along_columns = [&](int64_t point) {
        const float* from = shares + (point * kPoints * 2 * kDepth + k) * channels + a;
        const int64_t step = 2 * kDepth * channels;
        return v == 0 ? from[0] + from[step] : from[step] - from[2 * step];
      };
      args.dweight[taps.index(a, column)] =
          u == 0 ? along_columns(0) + along_columns(1) : along_columns(1) - along_columns(2);
    }
  }
}

template <class Body>
void with_big_channels(const StridedConvShape& s, const Body& body) {
  switch (s.big_channels) {
    case 1:
      return body(Int<1>{});
    case 2:
      return body(Int<2>{});
    case 3:
      return body(Int<3>{});
    case 4:
      return body(Int<4>{});
  }
}

}  // namespace

bool direct_takes(const StridedConvShape& s, ConvPass) {
  return s.big_channels <= kMostBigChannels && s.small_channels <= kMostSmallChannels &&
         s.normalized != ConvMap::big;
}

int64_t direct_scratch(const StridedConvShape& s, ConvPass pass) {
  return plan(s, pass).bytes(share_count(s));
}

void direct_up(const StridedConvUp& args) {
  with_big_channels(args.shape, [&](auto channels) {
    constexpr int B = decltype(channels)::value;
    args.shape.dtype == DType::f32 ? up<float, B>(args) : up<bfloat16, B>(args);
  });
}

void direct_down(const StridedConvDown& args) {
  with_big_channels(args.shape, [&](auto channels) {
    constexpr int B = decltype(channels)::value;
    if constexpr (Vec::width == 8) {
      return args.shape.dtype == DType::f32 ? down_by_rows<float, B>(args)
                                            : down_by_rows<bfloat16, B>(args);
    }
    if constexpr (kHasPairs) {
      if (pairs(args.shape)) return down_by_rows<bfloat16, B>(args);
    }
    args.shape.dtype == DType::f32 ? down_by_tiles<float, B>(args)
                                   : down_by_tiles<bfloat16, B>(args);
  });
}

void direct_weight_grad(const StridedConvWeightGrad& args) {
  with_big_channels(args.shape, [&](auto channels) {
    constexpr int B = decltype(channels)::value;
    if constexpr (kHasPairs) {
      if (pairs(args.shape)) return weight_grad_by_rows<B>(args);
    }
    args.shape.dtype == DType::f32 ? weight_grad_by_tiles<float, B>(args)
                                   : weight_grad_by_tiles<bfloat16, B>(args);
  });
}

}  // namespace pygan::PYGAN_ISA_NS
