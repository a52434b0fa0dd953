// Adversarial losses in one pass over the logits: loss, gradient and mean probability. Logits are
// few (one an image, or one a patch), so this runs on the calling thread.

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pygan::PYGAN_ISA_NS {
namespace {

constexpr int64_t kChunk = 16 * Vec::width;  // summed in float32 before the float64 sums

struct Sums {
  double loss = 0.0, probability = 0.0;
};

template <class T>
Sums group_loss(const GanLossGroup& group) {
  const T* logits = static_cast<const T*>(group.logits);
  T* grad = static_cast<T*>(group.grad);
  const Vec slope(static_cast<float>(group.weight / static_cast<double>(group.size)));
  const Vec zero(0.0f), one(1.0f);
  Sums sums;
  for (int64_t start = 0; start < group.size; start += kChunk) {
    const int64_t end = std::min(start + kChunk, group.size);
    Vec loss = zero, probability = zero;
    for (int64_t i = start; i < end; i += Vec::width) {
      const int lanes = static_cast<int>(std::min<int64_t>(Vec::width, end - i));
      const Vec x = load(logits + i, lanes);
      const Vec t = group.targets ? load(group.targets + i, lanes) : Vec(group.target);
      const Vec e = exp_negative(zero - abs(x));
      const Vec sigmoid = if_positive(x, one, e) / (one + e);
      // sigmoid - 1 = -e / (1 + e) for x > 0: written so that it does not cancel when t is 1.
      const Vec above = (if_positive(x, zero - e, e)) / (one + e);
      const Vec residual = if_positive(x, above + (one - t), above - t);
      const Vec value = max(zero, x) - x * t + log1p_unit(e);
      store(grad + i, slope * residual, lanes);
      loss = loss + keep(value, lanes);
      probability = probability + keep(sigmoid, lanes);
    }
    sums.loss += sum(loss);
    sums.probability += sum(probability);
  }
  return sums;
}

}  // namespace

void gan_loss(const GanLoss& args) {
  double total = 0.0;
  for (int i = 0; i < args.group_count; ++i) {
    const GanLossGroup& group = args.groups[i];
    const Sums sums =
        args.dtype == DType::f32 ? group_loss<float>(group) : group_loss<bfloat16>(group);
    const double size = static_cast<double>(group.size);
    total += group.weight * sums.loss / size;
    *group.probability = static_cast<float>(sums.probability / size);
  }
  *args.loss = static_cast<float>(total);
}

}  // namespace pygan::PYGAN_ISA_NS
