// The native contract on a GPU: the argument structs of pygan.h with arrays in device memory, and
// the stream last. Nothing here synchronises or allocates; the caller owns scratch until the
// stream has passed the call. `threads` is ignored. Float16 is taken too.
#pragma once

#include <string>

#include "pygan.h"

namespace pygan::cuda {

using Stream = void*;  // a cudaStream_t

// What became of a call: its arguments were refused, or the device refused a launch.
struct Outcome {
  Status status = Status::ok;
  int device_error = 0;  // a cudaError_t

  bool ok() const { return status == Status::ok && device_error == 0; }
};
std::string describe(const Outcome& outcome);

// Why no kernel can run in this process, in a sentence; empty where they can.
std::string unusable();
// Compute capabilities that machine code is compiled for, such as 80, slowest first.
std::string architectures();

// float32 elements of scratch.
int64_t gan_loss_scratch(const GanLoss& args);
Outcome gan_loss(const GanLoss& args, float* scratch, Stream stream);

// An index outside the images reads nothing and gives NaN: the host does not see indices.
Outcome image_batch(const ImageBatch& args, Stream stream);

// float64 elements, for the `scratch` of the structs.
int64_t norm_act_scratch(const NormActShape& shape);
// In training `variance` gets the unbiased one, [groups, channels]; or null. In evaluation with
// running statistics these are mean and variance, and fill mean and invstd.
Outcome norm_act_forward(const NormActForward& args, float* variance, Stream stream);
Outcome norm_act_backward(const NormActBackward& args, Stream stream);

// The image layers: strided_conv of pygan.h with 1 to 4 big channels, by direct kernels. Of the
// shape, `method` and `normalized` are ignored.
struct ImageConvUp {
  StridedConvShape shape;
  const void* small;
  const void* gate;  // or null
  float negative_slope;
  const float* weight;
  const float* bias;      // [big_channels] or null
  Activation activation;  // any but leaky_relu
  void* big;
};

struct ImageConvDown {
  StridedConvShape shape;
  const void* big;
  const float* weight;
  const float* bias;      // [small_channels] or null
  Activation activation;  // any
  float negative_slope;
  void* small;
};

struct ImageConvWeightGrad {
  StridedConvShape shape;
  const void* small;
  const void* gate;  // or null
  float negative_slope;
  const void* big;
  float* dweight;
  float* scratch;  // image_conv_scratch(shape) elements
};

int64_t image_conv_scratch(const StridedConvShape& shape);
Outcome image_conv_up(const ImageConvUp& args, Stream stream);
Outcome image_conv_down(const ImageConvDown& args, Stream stream);
Outcome image_conv_weight_grad(const ImageConvWeightGrad& args, Stream stream);

}  // namespace pygan::cuda
