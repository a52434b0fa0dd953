// What both Python modules do with their arguments: integers become pointers, tuples structs.
#pragma once

#include <pybind11/pybind11.h>

#include "pygan.h"

namespace pygan::bindings {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline GanLossGroup group_of(const pybind11::tuple& fields) {
  return {pointer<const void>(fields[0].cast<Address>()),
          pointer<const float>(fields[1].cast<Address>()),
          fields[2].cast<float>(),
          fields[3].cast<double>(),
          fields[4].cast<int64_t>(),
          pointer<void>(fields[5].cast<Address>()),
          pointer<float>(fields[6].cast<Address>())};
}

}  // namespace pygan::bindings
