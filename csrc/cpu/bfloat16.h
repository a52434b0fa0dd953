// Storage type: the upper half of a float32.
#pragma once

#include <cstdint>

namespace pygan {

struct bfloat16 {
  uint16_t bits;
};

}  // namespace pygan
