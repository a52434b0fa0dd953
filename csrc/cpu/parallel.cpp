#include "cpu/parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace pygan {
namespace {

struct Loop {
  void (*task)(void*, int64_t);
  void* context;
  int64_t count;

  // Fixed shares in order: a thread meets the same rows in every pass, and those that torch's own
  // loops gave it, so that they are in its cache.
  void run(int64_t thread, int64_t threads) const {
    for (int64_t i = count * thread / threads; i < count * (thread + 1) / threads; ++i) {
      task(context, i);
    }
  }
};

// Entry points that GNU's and LLVM's OpenMP runtimes share, in the runtime that torch brought into
// the process. Linking one of our own would start a second pool of spinning threads.
struct OpenMP {
  void (*fork)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread)();
  int (*threads)();

  template <class Function>
  static Function find(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  }
  explicit operator bool() const { return fork && thread && threads; }
};

const OpenMP& openmp() {
  static const OpenMP found{OpenMP::find<decltype(OpenMP::fork)>("GOMP_parallel"),
                            OpenMP::find<decltype(OpenMP::thread)>("omp_get_thread_num"),
                            OpenMP::find<decltype(OpenMP::threads)>("omp_get_num_threads")};
  return found;
}

}  // namespace

void parallel_for(int threads, int64_t count, void (*task)(void*, int64_t), void* context) {
  Loop loop{task, context, count};
  const int team = static_cast<int>(std::min<int64_t>(threads, count));
  if (team <= 1) {
    loop.run(0, 1);
  } else if (openmp()) {
    // The team may come smaller than asked for: shares follow its real size.
    const auto share = [](void* data) {
      static_cast<const Loop*>(data)->run(openmp().thread(), openmp().threads());
    };
    openmp().fork(share, &loop, static_cast<unsigned>(team), 0);
  } else {
    std::vector<std::thread> others;
    for (int i = 1; i < team; ++i) others.emplace_back([&loop, i, team] { loop.run(i, team); });
    loop.run(0, team);
    for (std::thread& other : others) other.join();
  }
}

}  // namespace pygan
