// Adversarial losses in one pass over the logits. Per logit: 4 or 2 bytes read, as many written,
// about 20 FLOPs. Logits are few, so launches decide: one up to kOneBlock logits a group, two
// beyond.

#include <type_traits>

#include "cuda/device.cuh"

namespace pygan::cuda {
namespace {

constexpr int64_t kOneBlock = 16 * kThreads;
constexpr int64_t kMaxBlocks = 512;

struct Group {
  const void* logits;
  const float* targets;
  float target, scale, share;  // weight / size and 1 / size
  int64_t size;
  void* grad;
  float* probability;
};

struct Groups {
  Group group[2];
  int count;
};

struct Sums {
  float loss, probability;
};

// This block's part of a group, scaled, in every thread.
template <class T>
__device__ Sums sums_of(const Group& group, float* shared) {
  const T* logits = static_cast<const T*>(group.logits);
  T* grad = static_cast<T*>(group.grad);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  Sums sums{0.0f, 0.0f};
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < group.size;
       i += step) {
    const float x = to_float(logits[i]);
    const float t = group.targets ? group.targets[i] : group.target;
    const float e = expf(-fabsf(x)), inverse = 1.0f / (1.0f + e);
    // sigmoid - 1 = -e / (1 + e) for x > 0: written so that it does not cancel when t is 1.
    const float residual = x > 0.0f ? (1.0f - t) - e * inverse : e * inverse - t;
    grad[i] = from_float<T>(group.scale * residual);
    sums.loss += fmaxf(x, 0.0f) - x * t + log1pf(e);
    sums.probability += (x > 0.0f ? 1.0f : e) * inverse;
  }
  sums.loss = block_sum(sums.loss, shared) * group.scale;
  sums.probability = block_sum(sums.probability, shared) * group.share;
  return sums;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    one_block_kernel(const __grid_constant__ Groups groups, float* loss) {
  __shared__ float shared[kWarps];
  float total = 0.0f;
  for (int i = 0; i < groups.count; ++i) {
    const Sums sums = sums_of<T>(groups.group[i], shared);
    total += sums.loss;
    if (threadIdx.x == 0) *groups.group[i].probability = sums.probability;
  }
  if (threadIdx.x == 0) *loss = total;
}

// partial [group, blocks, 2]
template <class T>
__global__ void __launch_bounds__(kThreads)
    partial_kernel(const __grid_constant__ Groups groups, float* partial) {
  __shared__ float shared[kWarps];
  const Sums sums = sums_of<T>(groups.group[blockIdx.y], shared);
  if (threadIdx.x == 0) {
    float* out = partial + 2 * (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x);
    out[0] = sums.loss;
    out[1] = sums.probability;
  }
}

__global__ void __launch_bounds__(kThreads)
    total_kernel(const __grid_constant__ Groups groups, const float* partial, int blocks,
                 float* loss) {
  __shared__ float shared[kWarps];
  float total = 0.0f;
  for (int i = 0; i < groups.count; ++i) {
    float group_loss = 0.0f, probability = 0.0f;
    for (int k = threadIdx.x; k < blocks; k += kThreads) {
      group_loss += partial[2 * (i * blocks + k)];
      probability += partial[2 * (i * blocks + k) + 1];
    }
    total += block_sum(group_loss, shared);
    probability = block_sum(probability, shared);
    if (threadIdx.x == 0) *groups.group[i].probability = probability;
  }
  if (threadIdx.x == 0) *loss = total;
}

int64_t blocks_of(const GanLoss& args) {
  int64_t size = 0;
  for (int i = 0; i < args.group_count; ++i) {
    if (args.groups[i].size > size) size = args.groups[i].size;
  }
  const int64_t blocks = div_up(size, kOneBlock);
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

Status check(const GanLoss& args, const float* scratch) {
  if (args.group_count < 1 || args.group_count > 2) return Status::bad_size;
  if (!known(args.dtype)) return Status::bad_enum;
  if (!args.loss || !scratch) return Status::bad_pointer;
  for (int i = 0; i < args.group_count; ++i) {
    const GanLossGroup& group = args.groups[i];
    if (group.size < 1) return Status::bad_size;
    if (!group.logits || !group.grad || !group.probability) return Status::bad_pointer;
  }
  return Status::ok;
}

}  // namespace

int64_t gan_loss_scratch(const GanLoss& args) { return 4 * blocks_of(args); }

Outcome gan_loss(const GanLoss& args, float* scratch, Stream stream) {
  if (const Status status = check(args, scratch); status != Status::ok) return {status};
  Groups groups{{}, args.group_count};
  for (int i = 0; i < args.group_count; ++i) {
    const GanLossGroup& group = args.groups[i];
    const double size = static_cast<double>(group.size);
    groups.group[i] = {group.logits,
                       group.targets,
                       group.target,
                       static_cast<float>(group.weight / size),
                       static_cast<float>(1.0 / size),
                       group.size,
                       group.grad,
                       group.probability};
  }
  const unsigned blocks = static_cast<unsigned>(blocks_of(args));
  with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (blocks == 1) {
      launch(one_block_kernel<T>, dim3(1), kThreads, stream, groups, args.loss);
    } else {
      launch(partial_kernel<T>, dim3(blocks, static_cast<unsigned>(args.group_count)), kThreads,
             stream, groups, scratch);
      launch(total_kernel, dim3(1), kThreads, stream, groups, scratch, static_cast<int>(blocks),
             args.loss);
    }
  });
  return launched();
}

}  // namespace pygan::cuda
