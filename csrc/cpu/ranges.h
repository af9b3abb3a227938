// Range checks of numbers that are used as places in memory: all of them at once, before any is
// used.
#pragma once

#include <algorithm>
#include <string>

#include "vector.h"

namespace spade_fast {

// The largest of `numbers` relative to `least`, which is 0 or −1. Numbers below `least` wrap around
// and count as larger than all others.
struct Largest {
  static ALWAYS_INLINE int64_t run(int64_t count, const int32_t* numbers, int64_t least) {
    const uint32_t from = static_cast<uint32_t>(least);
    uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t number = static_cast<uint32_t>(numbers[i]) - from;
      largest = number > largest ? number : largest;
    }
    return largest;
  }
};

struct EverFalls {
  static ALWAYS_INLINE bool run(int64_t count, const int32_t* numbers) {
    int32_t falls = 0;
#pragma omp simd reduction(| : falls)
    for (int64_t i = 1; i < count; ++i) falls |= numbers[i] < numbers[i - 1];
    return falls != 0;
  }
};

// Returns an empty string if all numbers are from `least` to `bound` − 1, else the error message.
inline std::string out_of_range(const char* name, const int32_t* numbers, int64_t count,
                                int64_t least, int64_t bound) {
  if (count == 0 || vectorised<Largest>(count, numbers, least) < bound - least) return {};
  const auto [lowest, highest] = std::minmax_element(numbers, numbers + count);
  return std::string("spade_fast: ") + name + " has numbers from " + std::to_string(*lowest) +
         " to " + std::to_string(*highest) + "; they should be from " + std::to_string(least) +
         " to " + std::to_string(bound - 1);
}

}  // namespace spade_fast
