// The native contract. Arrays are raw pointers; sizes count elements; nothing here knows Python or
// torch. Statistics and parameters are float32, accumulation is float32 or wider. Every function
// checks its arguments before it touches an array, allocates nothing and takes scratch from the
// caller.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pygan {

enum class DType : int { f32 = 0, bf16 = 1 };
enum class Layout : int { channels_last = 0, contiguous = 1 };
enum class Activation : int { none = 0, relu = 1, leaky_relu = 2, tanh = 3, sigmoid = 4 };

enum class Status : int {
  ok = 0,
  bad_size,     // a negative size, or sizes that do not divide
  bad_enum,     // a dtype, layout or activation outside its enum
  bad_pointer,  // a required array is null
  bad_index,    // an index outside [0, images)
  no_kernels,   // this machine runs none of the compiled instruction sets
};
const char* describe(Status status);

// Activations [batch, channels, spatial], stored [batch][spatial][channels] when channels_last.
// The batch is cut into `groups` equal runs with statistics of their own.
struct NormActShape {
  DType dtype;
  Layout layout;
  int64_t batch, channels, spatial, groups;
  Activation activation;
  float negative_slope;
  int threads;
};

// y = activation((x - mean) * invstd * weight + bias).
// training: mean and invstd of each group are computed and written, and running_mean and
// running_var follow group by group, in order. Otherwise they are read from mean and invstd.
struct NormActForward {
  NormActShape shape;
  const void* x;
  const float* weight;  // [channels] or null
  const float* bias;    // [channels] or null
  bool training;
  double eps, momentum;
  float* running_mean;  // [channels] or null
  float* running_var;   // [channels] or null
  void* y;
  float* mean;      // [groups, channels]
  float* invstd;    // [groups, channels]
  double* scratch;  // norm_act_scratch(shape) elements
};

// dz = dy * activation'(z); dbias = sum dz; dweight = sum dz * xhat;
// training: dx = weight * invstd * (dz - (dbias_g + xhat * dweight_g) / count_g) in each group g,
// otherwise dx = weight * invstd * dz.
struct NormActBackward {
  NormActShape shape;
  const void* x;
  const void* dy;
  const float* weight;  // [channels] or null
  const float* bias;    // [channels] or null
  const float* mean;    // [groups, channels]
  const float* invstd;  // [groups, channels]
  bool training;
  void* dx;        // null when not wanted
  float* dweight;  // [channels] or null
  float* dbias;    // [channels] or null
  double* scratch;
};

int64_t norm_act_scratch(const NormActShape& shape);
Status norm_act_forward(const NormActForward& args);
Status norm_act_backward(const NormActBackward& args);

// One set of logits with its targets: loss = weight * mean(max(x,0) - x*t + log1p(exp(-|x|))),
// the binary cross-entropy of sigmoid(x) against t for any real t.
struct GanLossGroup {
  const void* logits;    // [size]
  const float* targets;  // [size], or null for the one `target`
  float target;
  double weight;
  int64_t size;
  void* grad;          // [size] d loss / d logits, dtype of the logits
  float* probability;  // [1] mean sigmoid(x)
};

struct GanLoss {
  DType dtype;
  GanLossGroup groups[2];
  int group_count;
  float* loss;  // [1] sum over groups
};

Status gan_loss(const GanLoss& args);

// out[b, y, x, c] = (images[index[b], y, flip[b] ? width-1-x : x, c] - 127.5) / 127.5
struct ImageBatch {
  const uint8_t* images;  // [count, height, width, channels]
  int64_t count, height, width, channels;
  const int64_t* index;  // [batch]
  const uint8_t* flip;   // [batch], or null for none
  int64_t batch;
  DType dtype;
  void* out;  // [batch, height, width, channels]
  int threads;
};

Status image_batch(const ImageBatch& args);

// Instruction sets compiled in that this machine runs, slowest first; the one in use ("none"
// where there is none). PYGAN_ISA names a lower one; it is read once, at load.
std::vector<std::string> instruction_sets();
std::string instruction_set();

}  // namespace pygan
