// Gather, flip, scale and cast of uint8 images. Per value: 1 byte read, 4 or 2 written, 2 FLOPs;
// bound by memory, and by the launch for small images.

#include <type_traits>

#include "cuda/device.cuh"

namespace pygan::cuda {
namespace {

constexpr int64_t kMaxBlocks = 4096;
constexpr int64_t kMaxSize = 0x7fffffff;  // positions in an image are int

struct Images {
  const uint8_t* images;
  const int64_t* index;
  const uint8_t* flip;
  int64_t count, batch;
  int size, width, channels;  // size: values of an image
};

__device__ float value_of(const Images& args, int64_t image, bool flip, int i) {
  if (flip) {
    const int channel = i % args.channels, pixel = i / args.channels, x = pixel % args.width;
    i = (pixel - x + (args.width - 1 - x)) * args.channels + channel;
  }
  // Exactly -1 and 1 at both ends, and exact before the division.
  return (static_cast<float>(args.images[image * args.size + i]) - 127.5f) / 127.5f;
}

// N consecutive values a thread, of one image: N divides the size of an image.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) image_batch_kernel(Images args, T* out) {
  const int64_t total = args.batch * args.size;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * N;
  for (int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N; at < total;
       at += step) {
    const int64_t b = at / args.size, image = args.index[b];
    const int i = static_cast<int>(at - b * args.size);
    const bool known = image >= 0 && image < args.count, flip = args.flip && args.flip[b];
    float values[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      values[k] = known ? value_of(args, image, flip, i + k) : nanf("");
    }
    store(out + at, values);
  }
}

Status check(const ImageBatch& args) {
  if (args.count < 0 || args.height < 0 || args.width < 0 || args.channels < 0 || args.batch < 0) {
    return Status::bad_size;
  }
  if (!known(args.dtype)) return Status::bad_enum;
  if (args.batch * args.height * args.width * args.channels == 0) return Status::ok;
  if (args.height * args.width * args.channels > kMaxSize) return Status::bad_size;
  if (!args.images || !args.index || !args.out) return Status::bad_pointer;
  return Status::ok;
}

}  // namespace

Outcome image_batch(const ImageBatch& args, Stream stream) {
  if (const Status status = check(args); status != Status::ok) return {status};
  const int64_t size = args.height * args.width * args.channels, total = args.batch * size;
  if (total == 0) return {};
  const Images images{args.images,
                      args.index,
                      args.flip,
                      args.count,
                      args.batch,
                      static_cast<int>(size),
                      static_cast<int>(args.width),
                      static_cast<int>(args.channels)};
  with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* out = static_cast<T*>(args.out);
    const bool packs = aligned(out) && size % kPack<T> == 0;
    const int64_t wanted = div_up(total, kThreads * (packs ? kPack<T> : 1));
    const dim3 grid(static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks));
    launch(packs ? image_batch_kernel<T, kPack<T>> : image_batch_kernel<T, 1>, grid, kThreads,
           stream, images, out);
  });
  return launched();
}

}  // namespace pygan::cuda
