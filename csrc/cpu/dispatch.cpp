// Checks the arguments and calls the kernels of the instruction set chosen at load.

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace pygan {
namespace {

#define PYGAN_KERNELS(isa)                                                                    \
  Kernels {                                                                                   \
    #isa, isa::norm_act_forward, isa::norm_act_backward, isa::norm_act_second, isa::gan_loss, \
        isa::image_batch, isa::strided_conv_method, isa::strided_conv_scratch,                \
        isa::strided_conv_up, isa::strided_conv_down, isa::strided_conv_weight_grad           \
  }

std::vector<Kernels> runnable() {
  std::vector<Kernels> sets;
  __builtin_cpu_init();
#ifdef PYGAN_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    sets.push_back(PYGAN_KERNELS(avx2));
  }
#endif
#ifdef PYGAN_HAVE_AVX512
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) sets.push_back(PYGAN_KERNELS(avx512));
#ifdef PYGAN_HAVE_AVX512_BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    sets.push_back(PYGAN_KERNELS(avx512_bf16));
  }
#endif
#endif
  return sets;
}

#undef PYGAN_KERNELS

Kernels chosen() {
  const std::vector<Kernels> sets = runnable();
  if (sets.empty()) return {};
  if (const char* forced = std::getenv("PYGAN_ISA")) {
    for (const Kernels& set : sets) {
      if (std::strcmp(set.name, forced) == 0) return set;
    }
  }
  return sets.back();
}

const Kernels kernels = chosen();

Status check(const NormActShape& s) {
  if (s.batch < 0 || s.channels < 0 || s.spatial < 0 || s.groups < 1 || s.threads < 1 ||
      s.batch % s.groups != 0) {
    return Status::bad_size;
  }
  if (s.dtype < DType::f32 || s.dtype > DType::bf16 || s.layout < Layout::channels_last ||
      s.layout > Layout::contiguous || s.activation < Activation::none ||
      s.activation > Activation::sigmoid) {
    return Status::bad_enum;
  }
  return Status::ok;
}

Status check(const StridedConvShape& s) {
  const auto doubles = [](int64_t big, int64_t small) {
    return big == 2 * small || big == 2 * small + 1;
  };
  if (s.batch < 0 || s.height < 0 || s.width < 0 || s.small_channels < 0 || s.big_channels < 0 ||
      s.threads < 1 || !doubles(s.big_height, s.height) || !doubles(s.big_width, s.width)) {
    return Status::bad_size;
  }
  if (s.dtype < DType::f32 || s.dtype > DType::bf16 || s.weight_layout < Layout::channels_last ||
      s.weight_layout > Layout::contiguous || s.method < ConvMethod::automatic ||
      s.method > ConvMethod::f42 || s.normalized < ConvMap::none || s.normalized > ConvMap::big) {
    return Status::bad_enum;
  }
  return Status::ok;
}

bool empty(const StridedConvShape& s) {
  return s.batch * s.height * s.width * s.small_channels * s.big_channels == 0;
}

bool reads(const StridedConvShape& s, ConvPass pass) {
  switch (s.normalized) {
    case ConvMap::none:
      return true;
    case ConvMap::small:
      return pass != ConvPass::down;
    case ConvMap::big:
      return pass != ConvPass::up;
  }
  return false;
}

// A normalized map has coefficients, for groups that divide the batch, and no other one has.
bool whole(const ConvNorm& norm, const StridedConvShape& s) {
  if (s.normalized == ConvMap::none) return !norm.coefficients;
  return norm.coefficients && norm.groups >= 1 && s.batch % norm.groups == 0;
}

bool only_direct(const StridedConvUp& args) { return args.gate; }
bool only_direct(const StridedConvDown& args) { return args.activation != Activation::none; }
bool only_direct(const StridedConvWeightGrad& args) { return args.gate; }

// Runs a pass with `automatic` resolved, or says why it cannot run.
template <class Args>
Status run(Args args, ConvPass pass, void (*kernel)(const Args&), bool pointers) {
  if (const Status status = check(args.shape); status != Status::ok) return status;
  if (empty(args.shape)) return Status::bad_size;
  if (!pointers || !args.scratch || !whole(args.norm, args.shape)) return Status::bad_pointer;
  if (!kernel) return Status::no_kernels;
  args.shape.method = strided_conv_method(args.shape, pass);
  if (args.shape.method == ConvMethod::none) return Status::no_method;
  const bool normalized = args.shape.normalized != ConvMap::none;
  if (only_direct(args) && (normalized || args.shape.method != ConvMethod::direct)) {
    return Status::no_method;
  }
  kernel(args);
  return Status::ok;
}

bool empty(const NormActShape& s) { return s.batch * s.channels * s.spatial == 0; }

}  // namespace

const char* describe(Status status) {
  switch (status) {
    case Status::ok:
      return "ok";
    case Status::bad_size:
      return "a size is negative or does not divide";
    case Status::bad_enum:
      return "a dtype, layout or activation is unknown";
    case Status::bad_pointer:
      return "a required array is missing";
    case Status::bad_index:
      return "an index is outside the images";
    case Status::no_kernels:
      return "this machine runs none of the compiled instruction sets";
    case Status::no_method:
      return "no kernel takes this shape, or not with an activation or a gate";
  }
  return "unknown status";
}

RowBlocks row_blocks(const NormActShape& s) {
  constexpr int64_t kValues = 1 << 15, kMost = 64, kChunk = 64;
  const int64_t rows = s.batch / s.groups * s.spatial;
  const int64_t wanted = std::clamp<int64_t>(rows * s.channels / kValues, 1, kMost);
  const int64_t chunks = (rows + kChunk - 1) / kChunk;
  const int64_t size = std::max<int64_t>(1, (chunks + wanted - 1) / wanted) * kChunk;
  return {rows, size, std::max<int64_t>(1, (rows + size - 1) / size)};
}

int64_t norm_act_scratch(const NormActShape& s) {
  const int64_t blocks = s.layout == Layout::channels_last ? row_blocks(s).count : 1;
  // Behind the sums, four float32 coefficients for each channel of each group.
  return s.groups * (blocks * block_scratch(s, 2) + 2 * s.channels);
}

Status norm_act_forward(const NormActForward& args) {
  if (const Status status = check(args.shape); status != Status::ok) return status;
  if (empty(args.shape)) return Status::ok;
  if (!args.x || !(args.y || args.coefficients || args.training) || !args.mean || !args.invstd ||
      !args.scratch) {
    return Status::bad_pointer;
  }
  if (!kernels.norm_act_forward) return Status::no_kernels;
  kernels.norm_act_forward(args);
  return Status::ok;
}

Status norm_act_backward(const NormActBackward& args) {
  if (const Status status = check(args.shape); status != Status::ok) return status;
  if (empty(args.shape)) return Status::ok;
  if (!args.x || !args.dy || !args.mean || !args.invstd || !args.scratch) {
    return Status::bad_pointer;
  }
  if (!kernels.norm_act_backward) return Status::no_kernels;
  kernels.norm_act_backward(args);
  return Status::ok;
}

int64_t norm_act_second_scratch(const NormActShape& s) {
  const int64_t sums = row_blocks(s).count * block_scratch(s, kNormActSecondSums);
  return s.groups * (sums + (kNormActSecondCoefficients + 1) / 2 * s.channels);
}

Status norm_act_second(const NormActSecond& args) {
  const NormActShape& s = args.shape;
  if (const Status status = check(s); status != Status::ok) return status;
  if (s.layout != Layout::channels_last || s.activation > Activation::leaky_relu) {
    return Status::bad_enum;
  }
  if (empty(s)) return Status::ok;
  if (!args.x || !args.dy || !args.ddx || !args.mean || !args.invstd || !args.scratch) {
    return Status::bad_pointer;
  }
  if (!kernels.norm_act_second) return Status::no_kernels;
  kernels.norm_act_second(args);
  return Status::ok;
}

Status gan_loss(const GanLoss& args) {
  if (args.group_count < 1 || args.group_count > 2) return Status::bad_size;
  if (args.dtype < DType::f32 || args.dtype > DType::bf16) return Status::bad_enum;
  if (!args.loss) return Status::bad_pointer;
  for (int i = 0; i < args.group_count; ++i) {
    const GanLossGroup& group = args.groups[i];
    if (group.size < 1) return Status::bad_size;
    if (!group.logits || !group.grad || !group.probability) return Status::bad_pointer;
  }
  if (!kernels.gan_loss) return Status::no_kernels;
  kernels.gan_loss(args);
  return Status::ok;
}

Status image_batch(const ImageBatch& args) {
  if (args.count < 0 || args.height < 1 || args.width < 1 || args.channels < 1 ||
      args.channels > 4096 || args.batch < 0 || args.threads < 1) {
    return Status::bad_size;
  }
  if (args.dtype < DType::f32 || args.dtype > DType::bf16) return Status::bad_enum;
  if (args.batch == 0) return Status::ok;
  if (!args.images || !args.index || !args.out) return Status::bad_pointer;
  const bool inside = std::all_of(args.index, args.index + args.batch,
                                  [&](int64_t i) { return i >= 0 && i < args.count; });
  if (!inside) return Status::bad_index;
  if (!kernels.image_batch) return Status::no_kernels;
  kernels.image_batch(args);
  return Status::ok;
}

ConvMethod strided_conv_method(const StridedConvShape& shape, ConvPass pass) {
  const bool known = check(shape) == Status::ok && !empty(shape) && reads(shape, pass) &&
                     kernels.strided_conv_method;
  return known ? kernels.strided_conv_method(shape, pass) : ConvMethod::none;
}

int64_t strided_conv_scratch(const StridedConvShape& shape, ConvPass pass) {
  StridedConvShape resolved = shape;
  resolved.method = strided_conv_method(shape, pass);
  return resolved.method == ConvMethod::none ? 0 : kernels.strided_conv_scratch(resolved, pass);
}

Status strided_conv_up(const StridedConvUp& args) {
  return run(args, ConvPass::up, kernels.strided_conv_up, args.small && args.weight && args.big);
}

Status strided_conv_down(const StridedConvDown& args) {
  if (args.activation < Activation::none || args.activation > Activation::leaky_relu) {
    return Status::bad_enum;
  }
  return run(args, ConvPass::down, kernels.strided_conv_down,
             args.small && args.weight && args.big);
}

Status strided_conv_weight_grad(const StridedConvWeightGrad& args) {
  return run(args, ConvPass::weight_grad, kernels.strided_conv_weight_grad,
             args.small && args.big && args.dweight);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels& set : runnable()) names.emplace_back(set.name);
  return names;
}

std::string instruction_set() { return kernels.name; }

}  // namespace pygan
