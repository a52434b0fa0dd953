// What the passes of norm_act share: vectors and rows of channels_last maps, sums over rows, and
// the way back through an activation.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pygan::PYGAN_ISA_NS {

inline constexpr int64_t kChunkRows =
    16;  // a float32 sum takes so many values, then joins a float64 one
inline constexpr int64_t kStripRows = 4;  // in which what belongs to a channel is loaded once
inline constexpr int64_t kChunkValues = kChunkRows * Vec::width;
inline constexpr int64_t kTileValues = 1024;  // of an image, which are read from one place
inline constexpr int64_t kAhead = 4096;  // bytes; less is late, more is evicted before it is used
inline constexpr int64_t kSerialValues =
    1 << 14;  // below this a second thread costs more than it gives

// A value of an array that comes from memory, and the value a page before what is to be asked for.
struct Place {
  int64_t at, asked;
};

// A whole vector, or the lanes left at the end of a row. read and write are get and put for
// arrays that come from memory.
struct Whole {
  static constexpr int count() { return Vec::width; }
  template <class T>
  Vec get(const T* p) const {
    return load(p);
  }
  template <class T>
  Vec read(const T* array, Place place) const {
    __builtin_prefetch(reinterpret_cast<const char*>(array + place.asked) + kAhead);
    return load(array + place.at);
  }
  template <class T>
  void put(T* p, Vec value) const {
    store(p, value);
  }
  template <class T>
  void write(T* array, Place place, Vec value) const {
    __builtin_prefetch(reinterpret_cast<const char*>(array + place.asked) + kAhead, 1);
    store(array + place.at, value);
  }
};
struct Part {
  int lanes;
  int count() const { return lanes; }
  template <class T>
  Vec get(const T* p) const {
    return load(p, lanes);
  }
  template <class T>
  Vec read(const T* array, Place place) const {
    return load(array + place.at, lanes);
  }
  template <class T>
  void put(T* p, Vec value) const {
    store(p, value, lanes);
  }
  template <class T>
  void write(T* array, Place place, Vec value) const {
    store(array + place.at, value, lanes);
  }
};

template <class Body>
void for_each_vector(int64_t length, const Body& body) {
  int64_t i = 0;
  for (; i + Vec::width <= length; i += Vec::width) body(i, Whole{});
  if (i < length) body(i, Part{static_cast<int>(length - i)});
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

inline int team(const NormActShape& s) {
  return s.batch * s.channels * s.spatial < kSerialValues ? 1 : s.threads;
}

// z = (x - centre) * scale + shift, for a vector of channels or for one channel in all lanes.
struct Affine {
  Vec centre, scale, shift, slope;
};

// scale and shift of every channel of every group, [channels] each, `stride` from group to group.
template <class Args>
void fill_maps(const Args& args, float* maps, int64_t stride) {
  const int64_t C = args.shape.channels;
  for (int64_t g = 0; g < args.shape.groups; ++g) {
    float* scale = maps + g * stride;
    for (int64_t c = 0; c < C; ++c) {
      scale[c] = args.invstd[g * C + c] * (args.weight ? args.weight[c] : 1.0f);
      scale[C + c] = args.bias ? args.bias[c] : 0.0f;
    }
  }
}

// The maps of a group's channels, from arrays of the mean, and of scale and then shift.
struct ChannelMaps {
  const float *means, *maps;
  int64_t channels;
  Vec slope;
  template <class Lanes>
  Affine operator()(int64_t c, Lanes lanes) const {
    return {lanes.get(means + c), lanes.get(maps + c), lanes.get(maps + channels + c), slope};
  }
};

// dz from dy; d is x - mean.
template <Activation A>
Vec gradient_of_z(Vec d, Vec dy, const Affine& map) {
  return through_activation<A>(dy, fma(d, map.scale, map.shift), map.slope);
}

// Blocks of rows in parallel: body(first row of the batch, rows, block, group).
template <class Body>
void for_each_block(const NormActShape& s, const Body& body) {
  const RowBlocks blocks = row_blocks(s);
  parallel_for(team(s), s.groups * blocks.count, [&](int64_t block) {
    const int64_t g = block / blocks.count;
    const int64_t start = block % blocks.count * blocks.size;
    body(g * blocks.rows + start, std::min(blocks.size, blocks.rows - start), block, g);
  });
}

// A vector of channels in rows one below the other. Going through strips, loads and stores jump
// from row to row; what is asked for comes in the order of memory, which is what makes it fast.
template <int64_t Rows>
struct Strip {
  int64_t first, channel, channels;
  template <class Body>
  void each(const Body& body) const {
    const int64_t asked = first + (Rows - 1) * channel;
    for (int64_t r = 0; r < Rows; ++r) {
      body(Place{first + r * channels, asked + r * Vec::width});
    }
  }
};

// All strips of rows, so that what belongs to a channel is loaded once for each:
// body(strip, lanes).
template <int64_t Most = kStripRows, class Body>
void for_each_strip(int64_t row, int64_t rows, int64_t channels, const Body& body) {
  const int64_t end = row + rows;
  const auto take = [&](auto together) {
    for (; row + together <= end; row += together) {
      for_each_vector(channels, [&](int64_t c, auto lanes) {
        body(Strip<together>{row * channels + c, c, channels}, lanes);
      });
    }
  };
  take(std::integral_constant<int64_t, Most>{});
  take(std::integral_constant<int64_t, 1>{});
}

// `Sums` sums over rows for every channel, in the block's scratch: [Sums][channels] in float64,
// which chunks of rows join, then as many in float32 for the chunk. of_channel(channel, lanes) is
// what a strip needs, and add(place, lanes, that, sums) adds to each of its sums.
template <int Sums, int64_t ChunkRows = kChunkRows, class OfChannel, class Add>
void sum_rows(int64_t row, int64_t rows, int64_t channels, double* scratch,
              const OfChannel& of_channel, const Add& add) {
  float* chunk = reinterpret_cast<float*>(scratch + Sums * channels);
  std::fill_n(scratch, Sums * channels, 0.0);
  for (const int64_t end = row + rows; row < end; row += ChunkRows) {
    std::fill_n(chunk, Sums * channels, 0.0f);
    for_each_strip<std::min(kStripRows, ChunkRows)>(
        row, std::min(ChunkRows, end - row), channels, [&](auto strip, auto lanes) {
          const auto channel = of_channel(strip.channel, lanes);
          float* const kept = chunk + strip.channel;
          Vec sums[Sums];
          for (int i = 0; i < Sums; ++i) sums[i] = lanes.get(kept + i * channels);
          strip.each([&](Place place) { add(place, lanes, channel, sums); });
          for (int i = 0; i < Sums; ++i) lanes.put(kept + i * channels, sums[i]);
        });
    for (int64_t c = 0; c < Sums * channels; ++c) scratch[c] += chunk[c];
  }
}

// Where the scratch holds coefficients of every channel, behind the sums of the blocks.
template <int Sums>
float* behind_sums(const NormActShape& s, double* scratch) {
  return reinterpret_cast<float*>(scratch +
                                  s.groups * row_blocks(s).count * block_scratch(s, Sums));
}

// Adds the sums of a group's blocks up into those of its first, for every group.
template <int Sums>
void add_blocks(const NormActShape& s, double* scratch) {
  const int64_t count = row_blocks(s).count, size = block_scratch(s, Sums);
  for (int64_t g = 0; g < s.groups; ++g) {
    double* first = scratch + g * count * size;
    for (int64_t b = 1; b < count; ++b) {
      for (int64_t c = 0; c < Sums * s.channels; ++c) first[c] += first[b * size + c];
    }
  }
}

}  // namespace pygan::PYGAN_ISA_NS
