// Parts of strided_conv that live in files of their own. Arguments have been checked.
#pragma once

#include "cpu/kernels.h"

namespace pygan::PYGAN_ISA_NS {

inline int64_t ceil_div(int64_t size, int64_t step) { return (size + step - 1) / step; }
inline int64_t round_up(int64_t size, int64_t step) { return ceil_div(size, step) * step; }

// strided_conv_direct.cpp: 1 to 4 big channels, the layers that read or write images.
bool direct_takes(const StridedConvShape& shape, ConvPass pass);
int64_t direct_scratch(const StridedConvShape& shape, ConvPass pass);
void direct_up(const StridedConvUp& args);
void direct_down(const StridedConvDown& args);
void direct_weight_grad(const StridedConvWeightGrad& args);

}  // namespace pygan::PYGAN_ISA_NS
