// Runs of equal neighbours: most pixels of a layout equal the one before.
#pragma once

#include <cstdint>
#include <cstring>

#include "vector.h"

namespace spade_fast {

// Marks with 1 the values that differ from the value before.
template <typename Value>
struct MarkChanges {
  static ALWAYS_INLINE void run(int64_t count, const Value* values, uint8_t* differs) {
#pragma omp simd
    for (int64_t i = 1; i < count; ++i) differs[i] |= values[i] != values[i - 1];
  }
};

// Calls f(start, end) for each run: it ends before the next mark, which is 1.
template <typename F>
void for_each_run(const uint8_t* differs, int64_t count, const F& f) {
  for (int64_t start = 0, end; start < count; start = end) {
    const void* next = std::memchr(differs + start + 1, 1, count - start - 1);
    end = next == nullptr ? count : static_cast<const uint8_t*>(next) - differs;
    f(start, end);
  }
}

}  // namespace spade_fast
