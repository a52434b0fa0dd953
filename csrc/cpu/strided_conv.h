// Parts of strided_conv that live in files of their own. Arguments have been checked.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pygan::PYGAN_ISA_NS {

inline int64_t round_up(int64_t size, int64_t step) { return ceil_div(size, step) * step; }

// The normalization of some channels of a map: max(z, slope * z), z = (x - mean) * scale + shift.
struct ChannelNorm {
  Vec mean, scale, shift, slope;

  Vec operator()(Vec x) const {
    const Vec z = fma(x - mean, scale, shift);
    return max(z * slope, z);
  }
};

// The normalization of a map, by group of the batch; of a map that counts as it is, nothing.
class MapNorm {
 public:
  MapNorm() = default;
  MapNorm(const ConvNorm& norm, float slope, int64_t batch, int64_t channels)
      : coefficients_(norm.coefficients),
        images_(norm.groups > 0 ? batch / norm.groups : batch),
        channels_(channels),
        slope_(slope) {}

  explicit operator bool() const { return coefficients_; }

  // What the group of an image has, null where the map counts as it is.
  const float* of_image(int64_t image) const {
    return coefficients_ ? coefficients_ + image / images_ * 3 * channels_ : nullptr;
  }
  // For a vector of channels; load(address) reads as many floats.
  template <class Load>
  ChannelNorm at(const float* of_image, int64_t channel, const Load& load) const {
    const float* mean = of_image + channel;
    return {load(mean), load(mean + channels_), load(mean + 2 * channels_), Vec(slope_)};
  }

 private:
  const float* coefficients_ = nullptr;
  int64_t images_ = 1, channels_ = 0;
  float slope_ = 1.0f;
};

template <class Args>
MapNorm norm_of(const Args& args) {
  const StridedConvShape& s = args.shape;
  const bool small = s.normalized == ConvMap::small;
  return {args.norm, args.negative_slope, s.batch, small ? s.small_channels : s.big_channels};
}

// strided_conv_direct.cpp: 1 to 4 big channels, the layers that read or write images.
bool direct_takes(const StridedConvShape& shape, ConvPass pass);
int64_t direct_scratch(const StridedConvShape& shape, ConvPass pass);
void direct_up(const StridedConvUp& args);
void direct_down(const StridedConvDown& args);
void direct_weight_grad(const StridedConvWeightGrad& args);

}  // namespace pygan::PYGAN_ISA_NS
