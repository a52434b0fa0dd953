// F(M, 2): M outputs y_i = x_i g_0 + x_{i+1} g_1 from M + 1 products, as lines that are applied
// along both dimensions of a tile. Source: Lavin and Gray 2016, arXiv:1509.09308; M = 4 uses the
// points 1, -1, 1/2, -1/2 and infinity, which keep float32 within a few units of plain rounding.
#pragma once

#include "cpu/simd.h"

namespace pygan::PYGAN_ISA_NS {

template <int M>
struct Winograd;

template <>
struct Winograd<2> {
  static constexpr int points = 3;

  struct Input {
    static constexpr int in = 3, out = 3;
    static void apply(const Vec* x, Vec* v) {
      v[0] = x[0] - x[1];
      v[1] = x[1];
      v[2] = x[1] - x[2];
    }
  };
  struct Weight {
    static constexpr int in = 2, out = 3;
    static void apply(const Vec* g, Vec* u) {
      u[0] = g[0];
      u[1] = g[0] + g[1];
      u[2] = g[1];
    }
  };
  struct Output {
    static constexpr int in = 3, out = 2;
    static void apply(const Vec* m, Vec* y) {
      y[0] = m[0] + m[1];
      y[1] = m[1] - m[2];
    }
  };
  // The transposes of Output and Weight: they take the gradient through the same products.
  struct OutputGrad {
    static constexpr int in = 2, out = 3;
    static void apply(const Vec* y, Vec* m) {
      m[0] = y[0];
      m[1] = y[0] + y[1];
      m[2] = Vec(0.0f) - y[1];
    }
  };
  struct WeightGrad {
    static constexpr int in = 3, out = 2;
    static void apply(const Vec* u, Vec* g) {
      g[0] = u[0] + u[1];
      g[1] = u[1] + u[2];
    }
  };
};

template <>
struct Winograd<4> {
  static constexpr int points = 5;

  struct Input {
    static constexpr int in = 5, out = 5;
    static void apply(const Vec* x, Vec* v) {
      const Vec quarter(0.25f);
      const Vec odd = x[3] - quarter * x[1], even = x[2] - quarter * x[0];
      const Vec wide = x[3] - x[1], half = Vec(0.5f) * (x[2] - x[0]);
      v[0] = odd + even;
      v[1] = odd - even;
      v[2] = wide + half;
      v[3] = wide - half;
      v[4] = fma(quarter, x[0], x[4]) - Vec(1.25f) * x[2];
    }
  };
  struct Weight {
    static constexpr int in = 2, out = 5;
    static void apply(const Vec* g, Vec* u) {
      const Vec outer(2.0f / 3), inner(4.0f / 3), half = Vec(0.5f) * g[1];
      u[0] = outer * (g[0] + g[1]);
      u[1] = outer * (g[1] - g[0]);
      u[2] = Vec(0.0f) - inner * (g[0] + half);
      u[3] = inner * (g[0] - half);
      u[4] = g[1];
    }
  };
  struct Output {
    static constexpr int in = 5, out = 4;
    static void apply(const Vec* m, Vec* y) {
      const Vec sum = m[0] + m[1], difference = m[0] - m[1];
      const Vec sum_half = m[2] + m[3], difference_half = m[2] - m[3];
      y[0] = sum + sum_half;
      y[1] = fma(Vec(0.5f), difference_half, difference);
      y[2] = fma(Vec(0.25f), sum_half, sum);
      y[3] = fma(Vec(0.125f), difference_half, difference) + m[4];
    }
  };
  struct OutputGrad {
    static constexpr int in = 4, out = 5;
    static void apply(const Vec* y, Vec* m) {
      const Vec even = y[0] + y[2], odd = y[1] + y[3];
      const Vec even_half = fma(Vec(0.25f), y[2], y[0]);
      const Vec odd_half = fma(Vec(0.125f), y[3], Vec(0.5f) * y[1]);
      m[0] = even + odd;
      m[1] = even - odd;
      m[2] = even_half + odd_half;
      m[3] = even_half - odd_half;
      m[4] = y[3];
    }
  };
  struct WeightGrad {
    static constexpr int in = 5, out = 2;
    static void apply(const Vec* u, Vec* g) {
      const Vec outer(2.0f / 3), inner(4.0f / 3);
      g[0] = fma(outer, u[0] - u[1], inner * (u[3] - u[2]));
      g[1] = fma(outer, u[0] + u[1], u[4]) - Vec(2.0f / 3) * (u[2] + u[3]);
    }
  };
};

// Both phases of F(2, 2) of a row x_-1, x_0, x_1, x_2: points 0 to 2 serve outputs 0 and 2, points
// 2 to 4 outputs 1 and 3.
struct BothPhases {
  static constexpr int in = 4, out = 5;
  static void apply(const Vec* x, Vec* v) {
    v[0] = x[0] - x[1];
    v[1] = x[1];
    v[2] = x[1] - x[2];
    v[3] = x[2];
    v[4] = x[2] - x[3];
  }
};

// Applies Line along both dimensions of a square of load(i, j), and hands out store(i, j, value).
template <class Line, class Load, class Store>
inline __attribute__((always_inline)) void along_both(const Load& load, const Store& store) {
  Vec half[Line::out][Line::in];
#pragma GCC unroll 8
  for (int j = 0; j < Line::in; ++j) {
    Vec given[Line::in], made[Line::out];
#pragma GCC unroll 8
    for (int i = 0; i < Line::in; ++i) given[i] = load(i, j);
    Line::apply(given, made);
#pragma GCC unroll 8
    for (int i = 0; i < Line::out; ++i) half[i][j] = made[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < Line::out; ++i) {
    Vec made[Line::out];
    Line::apply(half[i], made);
#pragma GCC unroll 8
    for (int j = 0; j < Line::out; ++j) store(i, j, made[j]);
  }
}

}  // namespace pygan::PYGAN_ISA_NS
