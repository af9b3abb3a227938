// The elements of a tensor as a kernel's body reads and writes them, one block at a time: converted
// to and from Sum, whatever the dtype in memory.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

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

// A block of elements to read.
template <typename Sum>
struct Elements {
  const void* data;
  ScalarType type;

  // Returns a pointer to the data if they are Sums already, else fills the buffer and returns that.
  ALWAYS_INLINE const Sum* read(int64_t count, Sum* buffer) const {
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

// Copies with non-temporal stores, for outputs too large to be found in the cache later. The lines
// that are overwritten need not be read first, which halves the memory traffic. Other cores see the
// data after `finish_stream`.
ALWAYS_INLINE void stream(int64_t bytes, const void* from, void* to) {
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
#if defined(__x86_64__)
  const int64_t to_alignment = -reinterpret_cast<intptr_t>(target) & 15,
                head = to_alignment < bytes ? to_alignment : bytes;
  std::memcpy(target, source, head);
  source += head, target += head, bytes -= head;
  for (; bytes >= 16; source += 16, target += 16, bytes -= 16) {
    _mm_stream_ps(reinterpret_cast<float*>(target),
                  _mm_loadu_ps(reinterpret_cast<const float*>(source)));
  }
#endif
  std::memcpy(target, source, bytes);
}

inline void finish_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// A block of elements to write.
template <typename Sum>
struct Destination {
  void* data;
  ScalarType type;
  bool streams;

  ALWAYS_INLINE void write(int64_t count, const Sum* values) const {
    if (type == ScalarType::BFloat16) {
      write_as<BFloat16>(count, values);
    } else if (type == ScalarType::Half) {
      write_as<Half>(count, values);
    } else if (sizeof(Sum) == 8 && type == ScalarType::Float) {
      write_as<float>(count, values);
    } else {
      write_as<Sum>(count, values);
    }
  }

 private:
  template <typename Element>
  ALWAYS_INLINE void write_as(int64_t count, const Sum* values) const {
    if (!streams) return narrow<Element>(count, values, data);
    Element rounded[kBlock];
    narrow<Element>(count, values, rounded);
    stream(count * sizeof(Element), rounded, data);
  }
};

}  // namespace spade_fast
