// Vectors of 16 floats. bfloat16 is rounded by the CPU where it can, else in integers.
#pragma once

// GCC 12's own header reads registers that it declares undefined on purpose.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "cpu/bfloat16.h"

namespace pygan::PYGAN_ISA_NS {

struct Vec {
  static constexpr int width = 16;
  __m512 v;

  Vec() = default;
  Vec(__m512 value) : v(value) {}
  Vec(float value) : v(_mm512_set1_ps(value)) {}
};

inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
// The second operand when either is NaN, so max(limit, x) passes NaN through.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
inline Vec round(Vec a) { return _mm512_roundscale_ps(a.v, 8); }
// x * 2^n for whole n, denormals included.
inline Vec scale_by_power(Vec x, Vec n) { return _mm512_scalef_ps(x.v, n.v); }
// x > 0 ? a : b
inline Vec if_positive(Vec x, Vec a, Vec b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_GT_OQ), b.v, a.v);
}
// x < limit ? a : b
inline Vec if_less(Vec x, Vec limit, Vec a, Vec b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_LT_OQ), b.v, a.v);
}
inline Vec copy_sign(Vec magnitude, Vec sign) {
  const __m512i bit = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(magnitude.v),
                                             _mm512_and_si512(_mm512_castps_si512(sign.v), bit)));
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }

inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }

// The first `count` lanes, zero behind them.
inline Vec keep(Vec a, int count) { return _mm512_maskz_mov_ps(first(count), a.v); }

inline Vec widen(__m256i half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline __m256i narrow(Vec a) {
#ifdef __AVX512BF16__
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
#endif
}

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int count) { _mm512_mask_storeu_ps(p, first(count), a.v); }
// Past the caches: p is the start of a line. Other threads see it after a fence.
inline void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
inline void fence() { _mm_sfence(); }

inline Vec load(const bfloat16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const bfloat16* p, int count) {
  return widen(_mm256_maskz_loadu_epi16(first(count), p));
}
inline void store(bfloat16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a));
}
inline void store(bfloat16* p, Vec a, int count) {
  _mm256_mask_storeu_epi16(p, first(count), narrow(a));
}

inline Vec load(const uint8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Vec load(const uint8_t* p, int count) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(count), p)));
}

#ifdef __AVX512BF16__
// Words of two bfloat16, from the floats at even and at odd places.
inline Vec pair_up(Vec even, Vec odd) {
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.v, even.v));
  const __m512i places =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(places, halves));
}

// c + the two products of each pair of bfloat16 words.
inline Vec dot_pairs(Vec a, Vec b, Vec c) {
  return _mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v));
}
#endif

// rows[i][j] becomes rows[j][i], 16 x 16.
inline void transpose(Vec* rows) {
  __m512 t[16], u[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
  }
  const auto low = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  for (int i = 0; i < 4; ++i) {
    u[4 * i] = low(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = high(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = low(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = high(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    rows[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    rows[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    rows[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

}  // namespace pygan::PYGAN_ISA_NS
