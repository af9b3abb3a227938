// Numbering the windows of a map (windows.cpp), for module.cpp to give to Python.
#pragma once

#include <cstdint>
#include <vector>

namespace spade_fast {

struct Numbered {
  int64_t windows, taps;
  // The number of each place's window: 0, 1, … in the order of their first appearance.
  std::vector<int32_t> numbers;
  std::vector<int32_t> contents;  // [windows, taps]: what each window sees, -1 beyond the border
};

// The windows of k taps per axis of a map [N, *spatial]. Hashes are masked with `hash_mask`, so
// that a test can make them collide.
Numbered number_windows(const int32_t* map, const std::vector<int64_t>& shape, int64_t k,
                        uint64_t hash_mask);

// What windows of `rows` rows see, [windows, taps], as the four lists of layout.py's Sums.
void window_sums(const int32_t* contents, int64_t windows, int64_t taps, int64_t rows,
                 std::vector<int32_t>* lists);

// The positions of numbers below `bound`, sorted by number: those of number n come from
// (*starts)[n] to (*starts)[n + 1]. Negative numbers are left out.
void sort_by_number(const int32_t* numbers, int64_t count, int64_t bound,
                    std::vector<int32_t>* starts, int32_t* sorted);

// The same of numbers that are not negative, where nobody asks where each number starts.
void sort_positions(const int32_t* numbers, int64_t count, int64_t bound, int32_t* sorted);

}  // namespace spade_fast
