// Gradients of the gradients of normalise + activate. Bound by memory: reads x, dy and ddx twice,
// writes dx and ddy.

#include "cpu/norm_act.h"

namespace pygan::PYGAN_ISA_NS {
namespace {

constexpr int kSums = kNormActSecondSums;  // of ddx, dz, ddx dz, ddx d and dz d, d = x - mean

// The sums cancel: float64 takes over after fewer rows than for statistics.
constexpr int64_t kFewRows = 2;

// Of every channel of a group there are rows of [channels]: scale and shift as in ChannelMaps, then
// these.
//     dx = ddx * of_ddx + dz * of_dz + d * of_d + constant
//     ddz = ddx * scale + d * of_dz + level
struct Coefficients {
  Vec of_ddx, of_dz, of_d, constant, level;
  template <class Lanes>
  Coefficients(const float* rows, int64_t channels, Lanes lanes)
      : of_ddx(lanes.get(rows + 2 * channels)),
        of_dz(lanes.get(rows + 3 * channels)),
        of_d(lanes.get(rows + 4 * channels)),
        constant(lanes.get(rows + 5 * channels)),
        level(lanes.get(rows + 6 * channels)) {}
};

void finish(const NormActSecond& args, double count, float* rows) {
  const NormActShape& s = args.shape;
  const int64_t C = s.channels, blocks = row_blocks(s).count * block_scratch(s, kSums);
  for (int64_t c = 0; c < C; ++c) {
    double dweight = 0.0;
    const double ddweight = args.ddweight ? args.ddweight[c] : 0.0;
    const double ddbias = args.ddbias ? args.ddbias[c] : 0.0;
    for (int64_t g = 0; g < s.groups; ++g) {
      const double invstd = args.invstd[g * C + c];
      const double scale = invstd * (args.weight ? args.weight[c] : 1.0f);
      const double* sums = args.scratch + g * blocks + c;
      const double ddx = sums[0], dz = sums[C];
      const double ddx_xhat = sums[3 * C] * invstd, dz_xhat = sums[4 * C] * invstd;
      const double share = args.training ? 1.0 / count : 0.0;
      const double k = sums[2 * C] - (ddx * dz + ddx_xhat * dz_xhat) * share;
      // What dx takes of ddx and dz is rounded first, so that the rest of it takes away their mean
      // and their share of xhat exactly.
      const float of_ddx = static_cast<float>(-scale * dz_xhat * share * invstd);
      const float of_dz = static_cast<float>((ddweight - scale * ddx_xhat * share) * invstd);
      const double q = of_ddx * ddx + of_dz * dz, q_xhat = of_ddx * ddx_xhat + of_dz * dz_xhat;
      float* row = rows + g * kNormActSecondCoefficients * C + c;
      row[2 * C] = of_ddx;
      row[3 * C] = of_dz;
      row[4 * C] = static_cast<float>(-invstd * (q_xhat + invstd * scale * k) * share);
      row[5 * C] = static_cast<float>(-q * share);
      row[6 * C] = static_cast<float>(ddbias - scale * ddx * share);
      dweight += invstd * k;
    }
    if (args.dweight) args.dweight[c] = static_cast<float>(dweight);
  }
}

template <class T>
void second(const NormActSecond& args) {
  const NormActShape& s = args.shape;
  const T* x = static_cast<const T*>(args.x);
  const T* dy = static_cast<const T*>(args.dy);
  const T* ddx = static_cast<const T*>(args.ddx);
  T* dx = static_cast<T*>(args.dx);
  T* ddy = static_cast<T*>(args.ddy);
  const int64_t C = s.channels;
  float* rows = behind_sums<kSums>(s, args.scratch);
  fill_maps(args, rows, kNormActSecondCoefficients * C);
  const Vec slope(s.negative_slope);
  with_activation(s.activation, [&](auto chosen) {
    constexpr Activation A = decltype(chosen)::value;
    const auto maps = [&](int64_t g) {
      return ChannelMaps{args.mean + g * C, rows + g * kNormActSecondCoefficients * C, C, slope};
    };
    for_each_block(s, [&](int64_t row, int64_t count, int64_t block, int64_t g) {
      sum_rows<kSums, kFewRows>(row, count, C, args.scratch + block * block_scratch(s, kSums),
                                maps(g),
                                [&](Place place, auto lanes, const Affine& map, Vec* sums) {
                                  const Vec d = lanes.read(x, place) - map.centre;
                                  const Vec dz = gradient_of_z<A>(d, lanes.read(dy, place), map);
                                  const Vec a = lanes.read(ddx, place);
                                  sums[0] = sums[0] + a;
                                  sums[1] = sums[1] + dz;
                                  sums[2] = fma(a, dz, sums[2]);
                                  sums[3] = fma(a, d, sums[3]);
                                  sums[4] = fma(dz, d, sums[4]);
                                });
    });
    add_blocks<kSums>(s, args.scratch);
    finish(args, static_cast<double>(row_blocks(s).rows), rows);
    for_each_block(s, [&](int64_t row, int64_t count, int64_t, int64_t g) {
      const ChannelMaps map_of = maps(g);
      for_each_strip(row, count, C, [&](auto strip, auto lanes) {
        const Affine map = map_of(strip.channel, lanes);
        const Coefficients of(rows + g * kNormActSecondCoefficients * C + strip.channel, C, lanes);
        strip.each([&](Place place) {
          const Vec d = lanes.read(x, place) - map.centre;
          const Vec a = lanes.read(ddx, place);
          if (dx) {
            const Vec dz = gradient_of_z<A>(d, lanes.read(dy, place), map);
            const Vec linear = fma(d, of.of_d, of.constant);
            lanes.write(dx, place, fma(a, of.of_ddx, fma(dz, of.of_dz, linear)));
          }
          if (ddy) {
            const Vec linear = fma(d, of.of_dz, of.level);
            lanes.write(ddy, place, gradient_of_z<A>(d, fma(a, map.scale, linear), map));
          }
        });
      });
    });
  });
}

}  // namespace

void norm_act_second(const NormActSecond& args) {
  args.shape.dtype == DType::f32 ? second<float>(args) : second<bfloat16>(args);
}

}  // namespace pygan::PYGAN_ISA_NS
