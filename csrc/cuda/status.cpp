// What went wrong, as sentences.

#ifdef PYGAN_HOST_SHIM
#include "host_shim.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "pygan_cuda.h"

#ifndef PYGAN_CUDA_TARGETS
#define PYGAN_CUDA_TARGETS ""
#endif

namespace pygan::cuda {
namespace {

const char* sentence(Status status) {
  switch (status) {
    case Status::ok:
      return "ok";
    case Status::bad_size:
      return "a size is negative, does not divide or is beyond what a launch takes";
    case Status::bad_enum:
      return "a dtype, layout or activation is unknown";
    case Status::bad_pointer:
      return "a required array is missing";
    case Status::bad_index:
      return "an index is outside the images";
    case Status::no_kernels:
      return "no compiled kernel runs on this GPU";
    case Status::no_method:
      return "no kernel takes this shape";
  }
  return "unknown status";
}

}  // namespace

std::string describe(const Outcome& outcome) {
  if (outcome.status != Status::ok || outcome.device_error == 0) return sentence(outcome.status);
  const auto error = static_cast<cudaError_t>(outcome.device_error);
  return std::string("the GPU refused a launch: ") + cudaGetErrorString(error);
}

std::string unusable() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch reports it as its own
    return std::string("CUDA says: ") + cudaGetErrorString(error);
  }
  return devices == 0 ? "there is no GPU" : "";
}

std::string architectures() { return PYGAN_CUDA_TARGETS; }

}  // namespace pygan::cuda
