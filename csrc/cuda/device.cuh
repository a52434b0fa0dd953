// What the kernels share: types, 16-byte accesses, activations, warp sums, and the one launch.
// Without nvcc the same sources compile against a host_shim.h that runs them on a CPU.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "host_shim.h"
#endif

#include <cstdint>
#include <cstring>

#include "pygan_cuda.h"

namespace pygan::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMaxGridY = 65535;

inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(float16 value) { return __half2float(value); }

template <class T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline bfloat16 from_float<bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline float16 from_float<float16>(float value) {
  return __float2half_rn(value);
}

// Elements of 16 bytes.
template <class T>
constexpr int kPack = 16 / sizeof(T);

// N values from p, in one access where they fill 16 bytes: p is aligned to that then.
template <int N, class T>
__device__ void load(const T* p, float (&out)[N]) {
  if constexpr (N == kPack<T>) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    T values[N];
    memcpy(values, &raw, sizeof(raw));
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = to_float(values[k]);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = to_float(p[k]);
  }
}

template <int N, class T>
__device__ void store(T* p, const float (&in)[N]) {
  if constexpr (N == kPack<T>) {
    T values[N];
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] = from_float<T>(in[k]);
    uint4 raw;
    memcpy(&raw, values, sizeof(raw));
    *reinterpret_cast<uint4*>(p) = raw;
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) p[k] = from_float<T>(in[k]);
  }
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// A NaN stays one, as in torch.
__device__ inline float activate(Activation activation, float z, float slope) {
  switch (activation) {
    case Activation::relu:
      return z < 0.0f ? 0.0f : z;
    case Activation::leaky_relu:
      return z > 0.0f ? z : z * slope;
    case Activation::tanh:
      return tanhf(z);
    case Activation::sigmoid:
      return 1.0f / (1.0f + expf(-z));
    default:
      return z;
  }
}

__device__ inline float through_activation(Activation activation, float dy, float z, float slope) {
  switch (activation) {
    case Activation::relu:
      return z > 0.0f ? dy : 0.0f;
    case Activation::leaky_relu:
      return z > 0.0f ? dy : dy * slope;
    case Activation::tanh: {
      // 1 - tanh(z)^2 = 4 e / (1 + e)^2 with e = exp(-2 |z|) does not cancel.
      const float e = expf(-2.0f * fabsf(z)), inverse = 1.0f / (1.0f + e);
      return dy * 4.0f * e * inverse * inverse;
    }
    case Activation::sigmoid: {
      const float e = expf(-fabsf(z)), inverse = 1.0f / (1.0f + e);
      return dy * e * inverse * inverse;
    }
    default:
      return dy;
  }
}

template <class T>
__device__ T warp_sum(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  return value;
}

// The sum over the block's kThreads threads, in every thread; `shared` has kWarps elements.
template <class T>
__device__ T block_sum(T value, T* shared) {
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  T sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp];
  return sum;
}

inline bool known(DType dtype) { return dtype >= DType::f32 && dtype <= DType::f16; }
inline bool known(Layout layout) {
  return layout == Layout::channels_last || layout == Layout::contiguous;
}
inline bool known(Activation activation) {
  return activation >= Activation::none && activation <= Activation::sigmoid;
}

// Calls body with a null pointer of the type that dtype names.
template <class Body>
void with_type(DType dtype, const Body& body) {
  if (dtype == DType::f32) return body(static_cast<float*>(nullptr));
  if (dtype == DType::bf16) return body(static_cast<bfloat16*>(nullptr));
  body(static_cast<float16*>(nullptr));
}

inline Outcome launched() { return {Status::ok, static_cast<int>(cudaGetLastError())}; }

#ifdef __CUDACC__
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, Stream stream,
            const Arguments&... arguments) {
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
}
#endif

}  // namespace pygan::cuda
