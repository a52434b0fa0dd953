// Runs CUDA kernels on a CPU, to be included in place of CUDA's headers: blocks one after another,
// the threads of a block as coroutines of one thread of the process, switched at barriers and
// shuffles only. The order is fixed, and a barrier that not every thread reaches ends the process.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)
#define __syncthreads() host_shim::wait(host_shim::kAtBlock)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half h) { return static_cast<float>(h.value); }
inline __half __float2half_rn(float f) { return {static_cast<_Float16>(f)}; }
inline float __bfloat162float(__nv_bfloat16 h) {
  const uint32_t bits = static_cast<uint32_t>(h.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof(bits));
  if (std::isnan(f)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host_shim {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 1 << 16;

enum State { kReady, kAtWarp, kAtBlock, kDone };

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  State state = kDone;
  bool started = false;
};

inline std::vector<Fiber> fibers(kMaxThreads);
inline std::function<void()> body;
inline jmp_buf scheduler;
inline int current = 0;
inline uint64_t lanes[kMaxThreads];
inline int last_error = cudaSuccess;

[[noreturn]] inline void stop(const char* why) {
  fprintf(stderr, "host_shim: %s\n", why);
  abort();
}

// Swapping contexts asks the kernel for the signal mask every time; jumps do not.
inline void wait(State state) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  if (_setjmp(fiber.resume) == 0) _longjmp(scheduler, 1);
}

inline void run_forever() {
  for (;;) {
    body();
    wait(kDone);
  }
}

inline void resume(int thread) {
  Fiber& fiber = fibers[thread];
  current = thread;
  threadIdx = dim3(thread);
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  fiber.stack = std::make_unique<char[]>(kStack);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_forever, 0);
  setcontext(&fiber.context);
}

// Runs a warp until its threads are all at a block's barrier or all done.
inline State run_warp(int first) {
  for (;;) {
    for (int t = first; t < first + kWarp; ++t) {
      if (fibers[t].state == kReady) resume(t);
    }
    const State state = fibers[first].state;
    for (int t = first; t < first + kWarp; ++t) {
      if (fibers[t].state != state) stop("the threads of a warp wait for different things");
    }
    if (state != kAtWarp) return state;
    for (int t = first; t < first + kWarp; ++t) fibers[t].state = kReady;
  }
}

inline void run_block(int threads) {
  for (int t = 0; t < threads; ++t) fibers[t].state = kReady;
  for (;;) {
    const State state = run_warp(0);
    for (int first = kWarp; first < threads; first += kWarp) {
      if (run_warp(first) != state) stop("a barrier is not reached by the whole block");
    }
    if (state == kDone) return;
    for (int t = 0; t < threads; ++t) fibers[t].state = kReady;
  }
}

template <class T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  memcpy(&lanes[current], &value, sizeof(T));
  wait(kAtWarp);
  T result;
  memcpy(&result, &lanes[current / kWarp * kWarp + source], sizeof(T));
  wait(kAtWarp);
  return result;
}

}  // namespace host_shim

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return host_shim::exchange(value, host_shim::current % host_shim::kWarp ^ mask);
}

template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int lane = host_shim::current % host_shim::kWarp;
  return host_shim::exchange(value, lane + delta < host_shim::kWarp ? lane + delta : lane);
}

inline cudaError_t cudaGetLastError() {
  const int error = host_shim::last_error;
  host_shim::last_error = cudaSuccess;
  return static_cast<cudaError_t>(error);
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

namespace pygan::cuda {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, void*,
            const Arguments&... arguments) {
  if (threads % host_shim::kWarp != 0 || threads > host_shim::kMaxThreads || grid.x == 0 ||
      grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    host_shim::last_error = cudaErrorInvalidConfiguration;
    return;
  }
  gridDim = grid;
  blockDim = dim3(threads);
  host_shim::body = [&] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        host_shim::run_block(threads);
      }
    }
  }
}

}  // namespace pygan::cuda
