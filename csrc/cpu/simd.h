// The vector type of the instruction set being compiled, and functions written once against it.
#pragma once

#ifdef __AVX512F__
#include "cpu/simd_avx512.h"
#else
#include "cpu/simd_avx2.h"
#endif

namespace pygan::PYGAN_ISA_NS {

// exp(x) within 2 ulp for x <= 0, denormal results included; 0 below -104. NaN stays NaN.
// x = n ln2 + r with |r| <= ln2/2, then the Taylor polynomial of degree 7 (error 5e-9 relative).
inline Vec exp_negative(Vec x) {
  x = max(Vec(-104.0f), x);
  const Vec n = round(x * Vec(1.44269504f));
  const Vec r = fma(n, Vec(-1.42860677e-6f), fma(n, Vec(-0.693145752f), x));
  Vec p = fma(r, Vec(1.0f / 5040), Vec(1.0f / 720));
  p = fma(p, r, Vec(1.0f / 120));
  p = fma(p, r, Vec(1.0f / 24));
  p = fma(p, r, Vec(1.0f / 6));
  p = fma(p, r, Vec(0.5f));
  p = fma(p, r, Vec(1.0f));
  p = fma(p, r, Vec(1.0f));
  return scale_by_power(p, n);
}

// log(1 + u) for u in [0, 1]: 2 atanh(u / (2 + u)), a series in s^2 <= 1/9 (error 2e-9 relative).
inline Vec log1p_unit(Vec u) {
  const Vec s = u / (Vec(2.0f) + u);
  const Vec q = s * s;
  Vec p = fma(q, Vec(1.0f / 15), Vec(1.0f / 13));
  p = fma(p, q, Vec(1.0f / 11));
  p = fma(p, q, Vec(1.0f / 9));
  p = fma(p, q, Vec(1.0f / 7));
  p = fma(p, q, Vec(1.0f / 5));
  p = fma(p, q, Vec(1.0f / 3));
  p = fma(p, q, Vec(1.0f));
  return (s + s) * p;
}

// 1 / (1 + exp(-x)), relative accuracy on both sides.
inline Vec sigmoid(Vec x) {
  const Vec e = exp_negative(Vec(0.0f) - abs(x));
  return if_positive(x, Vec(1.0f), e) / (Vec(1.0f) + e);
}

// Derivatives of tanh and sigmoid, from the exponential: 1 - t^2 and s (1 - s) would cancel.
inline Vec tanh_slope(Vec x) {
  const Vec e = exp_negative(abs(x) * Vec(-2.0f));
  const Vec d = Vec(1.0f) + e;
  return Vec(4.0f) * e / (d * d);
}
inline Vec sigmoid_slope(Vec x) {
  const Vec e = exp_negative(Vec(0.0f) - abs(x));
  const Vec d = Vec(1.0f) + e;
  return e / (d * d);
}

// Near zero a Pade approximant (1 - exp(-2|x|) would cancel), elsewhere the exponential.
inline Vec tanh(Vec x) {
  const Vec magnitude = abs(x);
  const Vec q = x * x;
  const Vec top = fma(fma(q + Vec(378.0f), q, Vec(17325.0f)), q, Vec(135135.0f)) * magnitude;
  const Vec bottom =
      fma(fma(fma(q, Vec(28.0f), Vec(3150.0f)), q, Vec(62370.0f)), q, Vec(135135.0f));
  const Vec e = exp_negative(magnitude * Vec(-2.0f));
  const Vec limit(0.75f);
  const Vec value = if_less(magnitude, limit, top, Vec(1.0f) - e) /
                    if_less(magnitude, limit, bottom, Vec(1.0f) + e);
  return copy_sign(value, x);
}

}  // namespace pygan::PYGAN_ISA_NS
