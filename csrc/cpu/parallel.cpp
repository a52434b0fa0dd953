#include "cpu/parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace pygan {
namespace {

struct Loop {
  void (*task)(void*, int64_t);
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0};

  // Tickets, not fixed shares: every index is done even if fewer threads come than were asked for.
  void run() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(context, i);
  }
};

using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The OpenMP runtime that torch brought into the process, by the entry point that GNU's and LLVM's
// share. Linking one of our own would start a second pool of spinning threads.
Fork openmp_fork() {
  static const Fork fork = reinterpret_cast<Fork>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return fork;
}

}  // namespace

void parallel_for(int threads, int64_t count, void (*task)(void*, int64_t), void* context) {
  Loop loop{task, context, count};
  const int team = static_cast<int>(std::min<int64_t>(threads, count));
  if (team <= 1) {
    loop.run();
  } else if (const Fork fork = openmp_fork()) {
    fork([](void* data) { static_cast<Loop*>(data)->run(); }, &loop, static_cast<unsigned>(team),
         0);
  } else {
    std::vector<std::thread> others;
    for (int i = 1; i < team; ++i) others.emplace_back([&loop] { loop.run(); });
    loop.run();
    for (std::thread& other : others) other.join();
  }
}

}  // namespace pygan
