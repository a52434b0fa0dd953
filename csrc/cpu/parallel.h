// A parallel loop on the process's own OpenMP threads, so that two pools never fight for the cores.
#pragma once

#include <cstdint>

namespace pygan {

// Calls task(context, i) once for every i in [0, count), on at most `threads` threads.
void parallel_for(int threads, int64_t count, void (*task)(void*, int64_t), void* context);

template <class Body>
void parallel_for(int threads, int64_t count, const Body& body) {
  parallel_for(
      threads, count, [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); },
      const_cast<Body*>(&body));
}

}  // namespace pygan
