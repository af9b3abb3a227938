// Numbers the windows of a map (windows.cpp); module.cpp exports it to Python.
#pragma once

#include <cstdint>
#include <vector>

namespace spade_fast {

struct Numbered {
  int64_t windows, taps;
  // The number of each place's window: 0, 1, … in order of first appearance.
  std::vector<int32_t> numbers;
  std::vector<int32_t> contents;  // [windows, taps], -1 beyond the border
};

// Numbers the windows of k taps per axis of a map [N, *spatial]. Hashes are masked with `hash_mask`
// so that a test can make them collide.
Numbered number_windows(const int32_t* map, const std::vector<int64_t>& shape, int64_t k,
                        uint64_t hash_mask);

// Turns the contents [windows, taps] of windows of `rows` rows into the four lists of layout.py's
// Sums.
void window_sums(const int32_t* contents, int64_t windows, int64_t taps, int64_t rows,
                 std::vector<int32_t>* lists);

// The positions of numbers below `bound`, sorted by number: those of number n are
// sorted[(*starts)[n]] to sorted[(*starts)[n + 1] − 1]. Negative numbers are left out.
void sort_by_number(const int32_t* numbers, int64_t count, int64_t bound,
                    std::vector<int32_t>* starts, int32_t* sorted);

// The same for numbers that are not negative, without the starts.
void sort_positions(const int32_t* numbers, int64_t count, int64_t bound, int32_t* sorted);

}  // namespace spade_fast
