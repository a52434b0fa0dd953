// Gather, flip, scale and cast of uint8 images: one byte read and one value written per element.

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace pygan::PYGAN_ISA_NS {
namespace {

constexpr int64_t kSerialValues = 1 << 14;

// Exactly -1 and 1 at both ends, and exact before the division.
Vec scaled(Vec byte) { return (byte - Vec(127.5f)) / Vec(127.5f); }

template <class T>
void copy_row(const uint8_t* row, T* out, int64_t length) {
  int64_t i = 0;
  for (; i + Vec::width <= length; i += Vec::width) store(out + i, scaled(load(row + i)));
  if (i < length) {
    const int tail = static_cast<int>(length - i);
    store(out + i, scaled(load(row + i, tail)), tail);
  }
}

void mirror_row(const uint8_t* row, uint8_t* out, int64_t width, int64_t channels) {
  for (int64_t x = 0; x < width; ++x) {
    std::copy_n(row + (width - 1 - x) * channels, channels, out + x * channels);
  }
}

template <class T>
void gather(const ImageBatch& args) {
  const int64_t row_size = args.width * args.channels;
  const int64_t image_size = args.height * row_size;
  T* out = static_cast<T*>(args.out);
  const int threads = args.batch * image_size < kSerialValues ? 1 : args.threads;
  parallel_for(threads, args.batch, [&](int64_t b) {
    const uint8_t* image = args.images + args.index[b] * image_size;
    T* target = out + b * image_size;
    if (!args.flip || !args.flip[b]) return copy_row(image, target, image_size);
    // A mirrored row goes through a fixed buffer, pixel runs at a time.
    constexpr int64_t kBuffer = 4096;
    uint8_t buffer[kBuffer];
    const int64_t run = kBuffer / args.channels;
    for (int64_t y = 0; y < args.height; ++y) {
      for (int64_t x = 0; x < args.width; x += run) {
        const int64_t pixels = std::min(run, args.width - x);
        const uint8_t* source = image + y * row_size + (args.width - x - pixels) * args.channels;
        mirror_row(source, buffer, pixels, args.channels);
        copy_row(buffer, target + y * row_size + x * args.channels, pixels * args.channels);
      }
    }
  });
}

}  // namespace

void image_batch(const ImageBatch& args) {
  args.dtype == DType::f32 ? gather<float>(args) : gather<bfloat16>(args);
}

}  // namespace pygan::PYGAN_ISA_NS
