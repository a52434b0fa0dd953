// The register-blocked core of the matrix products. A word is a float32, or where the instruction
// set multiplies bfloat16 itself, two bfloat16 that are neighbours in the sum.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/simd.h"

namespace pygan::PYGAN_ISA_NS {

#ifdef __AVX512BF16__
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
Vec dot_pairs(Vec, Vec, Vec);  // never called: for the names in branches that are left out
Vec pair_up(Vec, Vec);
#endif

// Whether activations of this type are multiplied as pairs.
template <class T>
constexpr bool kPairs = kHasPairs && std::is_same_v<T, bfloat16>;

// Rows of the widest block: what accumulators, two vectors of b and a broadcast leave room for.
constexpr int kBlockRows = Vec::width == 16 ? 12 : 6;
constexpr int kBlockVectors = 2;
constexpr int kBlockColumns = kBlockVectors * Vec::width;

template <bool Pairs>
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  if constexpr (Pairs) {
    return dot_pairs(a, b, c);
  } else {
    return fma(a, b, c);
  }
}

// A word in every lane. bfloat16 pairs of a caller's array may lie at any even address.
inline Vec broadcast(const void* word) {
  float value;
  std::memcpy(&value, word, sizeof value);
  return Vec(value);
}

template <int Rows, int Vectors>
inline __attribute__((always_inline)) void clear(Vec (&acc)[Rows][Vectors]) {
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) acc[i][j] = Vec(0.0f);
  }
}

// to[i * row + j * width] = acc[i][j]
template <int Rows, int Vectors>
inline __attribute__((always_inline)) void store_block(float* to, int64_t row,
                                                       const Vec (&acc)[Rows][Vectors]) {
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) store(to + i * row + j * Vec::width, acc[i][j]);
  }
}

// acc[i][j] += sum_k a[i * a_row + k] * b[k * b_row + j * width], a in words.
template <bool Pairs, int Rows, int Vectors>
inline __attribute__((always_inline)) void accumulate(Vec (&acc)[Rows][Vectors], const float* a,
                                                      int64_t a_row, const float* b, int64_t b_row,
                                                      int64_t depth) {
  constexpr int kBases = (Rows + 2) / 3;
  const float* base[kBases];
#pragma GCC unroll 16
  for (int i = 0; i < kBases; ++i) base[i] = a + 3 * i * a_row;
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) right[j] = load(b + j * Vec::width);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec left = broadcast(base[i / 3] + i % 3 * a_row);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) {
        acc[i][j] = multiply_add<Pairs>(left, right[j], acc[i][j]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kBases; ++i) ++base[i];
    b += b_row;
  }
}

// acc[i][j] += sum_k a[k * a_word + i] * b[k * b_row + j * width]: the rows of a are neighbours.
template <bool Pairs, int Rows, int Vectors>
inline __attribute__((always_inline)) void accumulate_columns(Vec (&acc)[Rows][Vectors],
                                                              const float* a, int64_t a_word,
                                                              const float* b, int64_t b_row,
                                                              int64_t depth) {
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) right[j] = load(b + j * Vec::width);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec left = broadcast(a + i);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) {
        acc[i][j] = multiply_add<Pairs>(left, right[j], acc[i][j]);
      }
    }
    a += a_word;
    b += b_row;
  }
}

}  // namespace pygan::PYGAN_ISA_NS
