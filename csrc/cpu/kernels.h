// What each instruction set provides. Arguments have been checked.
#pragma once

#include "pygan.h"

namespace pygan {

struct Kernels {
  const char* name = "none";
  void (*norm_act_forward)(const NormActForward&) = nullptr;
  void (*norm_act_backward)(const NormActBackward&) = nullptr;
  void (*norm_act_second)(const NormActSecond&) = nullptr;
  void (*gan_loss)(const GanLoss&) = nullptr;
  void (*image_batch)(const ImageBatch&) = nullptr;
  ConvMethod (*strided_conv_method)(const StridedConvShape&, ConvPass) = nullptr;
  int64_t (*strided_conv_scratch)(const StridedConvShape&, ConvPass) = nullptr;
  void (*strided_conv_up)(const StridedConvUp&) = nullptr;
  void (*strided_conv_down)(const StridedConvDown&) = nullptr;
  void (*strided_conv_weight_grad)(const StridedConvWeightGrad&) = nullptr;
};

inline int64_t ceil_div(int64_t size, int64_t step) { return (size + step - 1) / step; }

// Rows of channels_last activations are handled in blocks that depend on the shape alone, so
// that results do not depend on the number of threads.
struct RowBlocks {
  int64_t rows;   // in a group
  int64_t size;   // rows in a block, the last one may have fewer
  int64_t count;  // blocks in a group
};
RowBlocks row_blocks(const NormActShape& shape);

// Elements of scratch for a block: `sums` of every channel in float64, and as many in float32.
inline int64_t block_scratch(const NormActShape& shape, int sums) {
  return sums * shape.channels + (sums * shape.channels + 1) / 2;
}

constexpr int kNormActSecondSums = 5, kNormActSecondCoefficients = 7;

#define PYGAN_DECLARE_KERNELS(isa)                                   \
  namespace isa {                                                    \
  void norm_act_forward(const NormActForward&);                      \
  void norm_act_backward(const NormActBackward&);                    \
  void norm_act_second(const NormActSecond&);                        \
  void gan_loss(const GanLoss&);                                     \
  void image_batch(const ImageBatch&);                               \
  ConvMethod strided_conv_method(const StridedConvShape&, ConvPass); \
  int64_t strided_conv_scratch(const StridedConvShape&, ConvPass);   \
  void strided_conv_up(const StridedConvUp&);                        \
  void strided_conv_down(const StridedConvDown&);                    \
  void strided_conv_weight_grad(const StridedConvWeightGrad&);       \
  }
PYGAN_DECLARE_KERNELS(avx2)
PYGAN_DECLARE_KERNELS(avx512)
PYGAN_DECLARE_KERNELS(avx512_bf16)
#undef PYGAN_DECLARE_KERNELS

}  // namespace pygan
