// The elements of a tensor as a kernel's body reads and writes them, a block at a time: as Sums, whatever their type in memory.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "vector.h"

namespace spade_fast {

using torch::headeronly::ScalarType;

template <typename Element, typename Sum>
ALWAYS_INLINE void widen(int64_t count, const void* from, Sum* to) {
  const Element* elements = static_cast<const Element*>(from);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = load(elements[i]);
}

template <typename Element, typename Sum>
ALWAYS_INLINE void narrow(int64_t count, const Sum* from, void* to) {
  Element* elements = static_cast<Element*>(to);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) store(elements[i], from[i]);
}

// Elements to read: neighbours in memory, or with an index those of a table's row that it names.
template <typename Sum>
struct Elements {
  const void* data;
  ScalarType type;
  const int32_t* index;  // of Sums

  // Where they lie already as Sums, else the buffer, filled with them.
  ALWAYS_INLINE const Sum* read(int64_t count, Sum* buffer) const {
    if (index != nullptr) {
      const Sum* row = static_cast<const Sum*>(data);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) buffer[i] = row[index[i]];
      return buffer;
    }
    if (type == ScalarType::BFloat16) {
      widen<BFloat16>(count, data, buffer);
    } else if (type == ScalarType::Half) {
      widen<Half>(count, data, buffer);
    } else if (sizeof(Sum) == 8 && type == ScalarType::Float) {
      widen<float>(count, data, buffer);
    } else {
      return static_cast<const Sum*>(data);
    }
    return buffer;
  }
};

// Where elements are to be written.
template <typename Sum>
struct Place {
  void* data;
  ScalarType type;

  ALWAYS_INLINE void write(int64_t count, const Sum* values) const {
    if (type == ScalarType::BFloat16) {
      narrow<BFloat16>(count, values, data);
    } else if (type == ScalarType::Half) {
      narrow<Half>(count, values, data);
    } else if (sizeof(Sum) == 8 && type == ScalarType::Float) {
      narrow<float>(count, values, data);
    } else {
      narrow<Sum>(count, values, data);
    }
  }
};

}  // namespace spade_fast
