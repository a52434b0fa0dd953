// Tiles of a map, the windows of the input that they need, their transform, and scratch: what
// the products and the gradient of a strided convolution have in common.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/gemm.h"
#include "cpu/strided_conv.h"
#include "cpu/winograd.h"

namespace pygan::PYGAN_ISA_NS {
// Every file has its own, so that what is called once is inlined.
namespace {

constexpr int64_t kLine = 16;  // floats of a cache line

// Floats from one row of `words` to the next: whole lines, and one more, so that the rows of a
// block do not fall on the same lines of the cache.
int64_t row_stride(int64_t words) { return round_up(words, kLine) + kLine; }

// Neighbours in the sum that share a word: channels, in weight_grad tiles.
template <class T>
constexpr int kPerWord = kPairs<T> ? 2 : 1;

// Whole lines that other threads read next. They go past the caches: to take a line from the cache
// of a thread that sits far away costs more than to write it to memory.
template <bool Shared>
inline void store_words(float* p, Vec value) {
  if constexpr (Shared) {
    stream(p, value);
  } else {
    store(p, value);
  }
}

// Hands out pieces of the caller's scratch, or only counts them.
class Scratch {
 public:
  explicit Scratch(void* start) : start_(static_cast<char*>(start)) {}

  float* floats(int64_t count) {
    float* piece = start_ ? reinterpret_cast<float*>(start_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(float)), 64);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

// Of scratch of one of the teams of Product or Gradient.
template <class Pass>
int64_t team_bytes(const Pass& pass) {
  Scratch pieces(nullptr);
  pass.carve(pieces);
  return pieces.used();
}

template <class Pass>
int64_t scratch_bytes(const Pass& pass) {
  return pass.teams * team_bytes(pass);
}

struct Map {
  int64_t height, width, channels;
};

Map small_map(const StridedConvShape& s) { return {s.height, s.width, s.small_channels}; }
Map big_map(const StridedConvShape& s) { return {s.big_height, s.big_width, s.big_channels}; }

// A tile is M x M places of the small map; of `up`, where the big map may have one row more than
// twice the small one, of the places that the big map covers.
struct Tiles {
  int64_t down, across, count;

  Tiles(int64_t batch, int64_t height, int64_t width, int m)
      : down(ceil_div(height, m)), across(ceil_div(width, m)), count(batch * down * across) {}

  struct Place {
    int64_t image, y, x;  // y and x count tiles
  };
  Place place(int64_t tile) const {
    return {tile / (down * across), tile / across % down, tile % across};
  }
};

// A map that a pass reads, and a pixel of zeros for what lies around it.
template <class T>
struct Operand {
  const T* values;
  Map map;
  MapNorm norm;
  const T* zeros;
};

// Addresses of a square of pixels of an image, `step` apart; outside the map they point to zeros.
template <class T, int Size>
struct Window {
  const T* at[Size][Size];
  const T* zeros;
  const MapNorm& norm;
  const float* coefficients;  // of the image, null where its values count as they are

  Window(const Operand<T>& from, int64_t image, int64_t y, int64_t x, int step)
      : zeros(from.zeros), norm(from.norm), coefficients(from.norm.of_image(image)) {
    const Map& map = from.map;
    const T* first = from.values + image * map.height * map.width * map.channels;
    for (int i = 0; i < Size; ++i) {
      for (int j = 0; j < Size; ++j) {
        const int64_t row = y + i * step, column = x + j * step;
        const bool inside = row >= 0 && row < map.height && column >= 0 && column < map.width;
        at[i][j] = inside ? first + (row * map.width + column) * map.channels : zeros;
      }
    }
  }
};

// Pixels of a tile of `size` x `size`: all of them, or a subgrid's.
struct TilePixels {
  int64_t size;
  int y, x, step;
};

// Asks for the pixels that the tile after the next brings: its windows jump between rows of the
// map, which the hardware does not follow.
template <class T>
void prefetch_tile(const Operand<T>& from, const Tiles& tiles, int64_t tile, TilePixels pixels) {
  tile += 2;
  if (tile >= tiles.count) return;
  const Tiles::Place at = tiles.place(tile);
  const Map& of = from.map;
  const int64_t top = at.y * pixels.size, left = at.x * pixels.size;
  const int64_t height = std::min(pixels.size, of.height - top);
  const int64_t width = std::min(pixels.size, of.width - left);
  const int64_t bytes = of.channels * static_cast<int64_t>(sizeof(T));
  for (int64_t i = pixels.y; i < height; i += pixels.step) {
    for (int64_t j = pixels.x; j < width; j += pixels.step) {
      const int64_t pixel = (at.image * of.height + top + i) * of.width + left + j;
      const char* first = reinterpret_cast<const char*>(from.values + pixel * of.channels);
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(first + b);
    }
  }
}

// body(first channel, load): whole vectors, then the rest, zero behind it.
template <class Body>
inline void for_each_vector(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + Vec::width <= channels; c += Vec::width) {
    body(c, [](const auto* p) { return load(p); });
  }
  if (c < channels) {
    const int rest = static_cast<int>(channels - c);
    body(c, [rest](const auto* p) { return load(p, rest); });
  }
}

// Applies Line to a vector of channels of a window: store(i, j, value).
template <class Line, class T, class Read, class Store>
inline __attribute__((always_inline)) void transform_window(const Window<T, Line::in>& window,
                                                            int64_t c, const Read& read,
                                                            const Store& store) {
  if (!window.coefficients) {
    along_both<Line>([&](int i, int j) { return read(window.at[i][j] + c); }, store);
    return;
  }
  const ChannelNorm norm = window.norm.at(window.coefficients, c, read);
  along_both<Line>(
      [&](int i, int j) {
        const T* pixel = window.at[i][j];
        return pixel == window.zeros ? Vec(0.0f) : norm(read(pixel + c));
      },
      store);
}

// Transforms one window into a row of every plane, as words of neighbouring channels.
template <class Line, class T>
void transform_input(const Window<T, Line::in>& window, int64_t channels, float* row,
                     int64_t plane) {
  for_each_vector(channels, [&](int64_t c, const auto& read) {
    transform_window<Line>(window, c, read, [&](int i, int j, Vec value) {
      float* to = row + (i * Line::out + j) * plane;
      if constexpr (kPairs<T>) {
        store(reinterpret_cast<T*>(to) + c, value);
      } else {
        store(to + c, value);
      }
    });
  });
}

// Covers rows by blocks of few sizes, body(integral_constant size, first row). The last block may
// reach behind the rows, to the next multiple of 4, or of 6 where that is the widest block.
template <class Body>
inline void for_row_blocks(int64_t rows, const Body& body) {
  for (int64_t r = 0; r < rows;) {
    const int64_t rest = rows - r;
    const auto block = [&](auto size) {
      body(size, r);
      r += decltype(size)::value;
    };
    if constexpr (kBlockRows == 6) {
      rest > 4 ? block(std::integral_constant<int, 6>{}) : block(std::integral_constant<int, 4>{});
    } else if (rest > 16 || (rest > 8 && rest <= 12)) {
      block(std::integral_constant<int, kBlockRows>{});
    } else if (rest > 4) {
      block(std::integral_constant<int, 8>{});
    } else {
      block(std::integral_constant<int, 4>{});
    }
  }
}

}  // namespace
}  // namespace pygan::PYGAN_ISA_NS
