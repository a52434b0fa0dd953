// The native contract. Arrays are raw pointers; sizes count elements; nothing here knows Python or
// torch. Statistics and parameters are float32, accumulation is float32 or wider. Every function
// checks its arguments before it touches an array, allocates nothing and takes scratch from the
// caller.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pygan {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };  // f16 on a GPU only
enum class Layout : int { channels_last = 0, contiguous = 1 };
enum class Activation : int { none = 0, relu = 1, leaky_relu = 2, tanh = 3, sigmoid = 4 };

enum class Status : int {
  ok = 0,
  bad_size,     // a negative size, or sizes that do not divide
  bad_enum,     // a dtype, layout or activation outside its enum
  bad_pointer,  // a required array is null
  bad_index,    // an index outside [0, images)
  no_kernels,   // this machine runs none of the compiled instruction sets
  no_method,    // no kernel takes this shape, or not with an activation or a gate
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
// Without y only the statistics and the coefficients are computed.
struct NormActForward {
  NormActShape shape;
  const void* x;
  const float* weight;  // [channels] or null
  const float* bias;    // [channels] or null
  bool training;
  double eps, momentum;
  float* running_mean;  // [channels] or null
  float* running_var;   // [channels] or null
  void* y;              // or null, as in training for the statistics alone
  float* mean;          // [groups, channels]
  float* invstd;        // [groups, channels]
  float* coefficients;  // [groups, 3, channels] mean, invstd * weight, bias; or null
  double* scratch;      // norm_act_scratch(shape) elements
};

// dz = dy * activation'(z); dbias = sum dz; dweight = sum dz * xhat;
// training: dx = weight * invstd * (dz - (dbias_g + xhat * dweight_g) / count_g) in each group g,
// otherwise dx = weight * invstd * dz. dx may be dy.
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

// Gradients of an objective made of dx, dweight and dbias of norm_act_backward, whose gradients
// with respect to them are ddx, ddweight and ddbias. Sums are over a group, of n values a channel:
//   ddz = weight * invstd * (ddx - (sum ddx + xhat * sum ddx xhat) / n) + ddweight * xhat + ddbias
//   ddy = ddz * activation'(z)
//   k   = sum ddx dz - (sum ddx * sum dz + sum ddx xhat * sum dz xhat) / n
//   q   = -weight * invstd * (ddx * sum dz xhat + dz * sum ddx xhat) / n + ddweight * dz
//   dx  = invstd * (q - (sum q + xhat * (sum q xhat + weight * invstd * k)) / n)
//   dweight = invstd * k
// and without every term with n where not training. channels_last, and an activation without a
// second derivative: none, relu or leaky_relu.
struct NormActSecond {
  NormActShape shape;
  const void* x;
  const void* dy;
  const void* ddx;
  const float* weight;    // [channels] or null
  const float* bias;      // [channels] or null
  const float* ddweight;  // [channels] or null
  const float* ddbias;    // [channels] or null
  const float* mean;      // [groups, channels]
  const float* invstd;    // [groups, channels]
  bool training;
  void* dx;         // null when not wanted
  void* ddy;        // null when not wanted
  float* dweight;   // [channels] or null
  double* scratch;  // norm_act_second_scratch(shape) elements
};

int64_t norm_act_scratch(const NormActShape& shape);
Status norm_act_forward(const NormActForward& args);
Status norm_act_backward(const NormActBackward& args);
int64_t norm_act_second_scratch(const NormActShape& shape);
Status norm_act_second(const NormActSecond& args);

// The 4x4 convolution of stride 2 and padding 1, its transpose, and the gradient of their weight:
//   small[n, y, x, a] = sum_{i, j, b} big[n, 2y - 1 + i, 2x - 1 + j, b] w[a, b, i, j]    (down)
//   big[n, p, q, b]   = sum over the same terms of small[n, y, x, a] w[a, b, i, j]       (up)
//   dw[a, b, i, j]    = sum over the same terms of small[n, y, x, a] big[n, p, q, b]
// small [batch, height, width, small_channels] and big [batch, big_height, big_width,
// big_channels] are channels_last; big_height is 2 height or 2 height + 1, big_width likewise.
// Weights and their gradient are float32, [a][i][j][b] when weight_layout is channels_last and
// [a][b][i][j] when it is contiguous.
// Only the direct method takes an activation or a gate. The activation follows the bias. A gate is
// an array like small; with it every value of small counts as small * (gate > 0 ? 1 :
// negative_slope), so that up and weight_grad go back through a ReLU (slope 0) or LeakyReLU (slope
// not below 0) behind down, whose output is the gate.
// A map that is `normalized` counts as max(z, negative_slope * z), z = (x - mean) * scale + shift,
// with coefficients [groups, 3, channels] (mean, scale, shift) for as many equal runs of the batch:
// a batch norm and the ReLU (slope 0), LeakyReLU or nothing (slope 1) behind it, without a map of
// its own. The direct method takes small so, Winograd either; a map is not both gated and that.
enum class ConvPass : int { up = 0, down = 1, weight_grad = 2 };

// direct: few big channels; f22 and f42: Winograd with 2x2 and 4x4 outputs a tile.
enum class ConvMethod : int { automatic = 0, none = 1, direct = 2, f22 = 3, f42 = 4 };

enum class ConvMap : int { none = 0, small = 1, big = 2 };

struct StridedConvShape {
  DType dtype;  // of small and big
  Layout weight_layout;
  int64_t batch, height, width, big_height, big_width;
  int64_t small_channels, big_channels;
  ConvMethod method;
  ConvMap normalized;  // among the maps that the pass reads
  int threads;
};

// What turns a normalized map's values into those that count; all null or 0 without one.
struct ConvNorm {
  const float* coefficients;
  int64_t groups;
};

struct StridedConvUp {
  StridedConvShape shape;
  const void* small;
  const void* gate;  // or null
  ConvNorm norm;
  float negative_slope;
  const float* weight;
  const float* bias;  // [big_channels] or null
  void* big;
  void* scratch;  // strided_conv_scratch(shape, pass) bytes, 64-byte aligned
};

struct StridedConvDown {
  StridedConvShape shape;
  const void* big;
  ConvNorm norm;
  const float* weight;
  const float* bias;      // [small_channels] or null
  Activation activation;  // none, relu or leaky_relu
  float negative_slope;   // of the activation, or of the norm
  void* small;
  void* scratch;
};

struct StridedConvWeightGrad {
  StridedConvShape shape;
  const void* small;
  const void* gate;  // or null
  ConvNorm norm;
  float negative_slope;
  const void* big;
  float* dweight;
  void* scratch;
};

// What `automatic` stands for: none where no kernel is expected to beat a library's, or where a
// named method cannot take the shape. bfloat16 has no f42 where the CPU multiplies it itself: its
// transforms would be rounded too coarsely.
ConvMethod strided_conv_method(const StridedConvShape& shape, ConvPass pass);
int64_t strided_conv_scratch(const StridedConvShape& shape, ConvPass pass);
Status strided_conv_up(const StridedConvUp& args);
Status strided_conv_down(const StridedConvDown& args);
Status strided_conv_weight_grad(const StridedConvWeightGrad& args);

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
