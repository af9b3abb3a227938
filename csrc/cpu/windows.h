// Numbers the windows of a map (windows.cpp); module.cpp exports it to Python.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace spade_fast {

// Whether int32 can count one · other places.
inline bool countable(int64_t one, int64_t other) {
  int64_t product;
  return !__builtin_mul_overflow(one, other, &product) && product < INT32_MAX;
}

// Numbers the windows of k taps per axis of a map [N, *spatial]: `numbers` receives the number of
// each place's window, 0, 1, … in order of first appearance. Returns the contents [windows, taps],
// −1 beyond the border. Hashes are masked with `hash_mask` so that a test can make them collide.
std::vector<int32_t> number_windows(const int32_t* map, const std::vector<int64_t>& shape,
                                    int64_t k, uint64_t hash_mask, int32_t* numbers);

// A map of codes, and what layout.py's Windows has of it.
struct MapWindows {
  const int32_t* codes;
  std::vector<int64_t> shape;  // [N, *spatial]
  int32_t *index, *order;      // memory of the codes' size
  std::vector<int32_t> hidden[4], table[4];
  std::string wrong;  // why the codes are refused, or empty
};

// Finds the windows of k taps per axis of maps of codes below `rows`, and the windows of these.
void find_windows(int64_t k, int64_t rows, std::vector<MapWindows>* maps);

// Turns the contents [windows, taps] of windows of `rows` rows into the four lists of layout.py's
// Sums.
void window_sums(const int32_t* contents, int64_t windows, int64_t taps, int64_t rows,
                 std::vector<int32_t>* lists);

// The pixels of each image of an index [N, *spatial] of numbers from 0 to bound − 1, sorted by
// their numbers.
void sort_pixels(const int32_t* index, const std::vector<int64_t>& shape, int64_t bound,
                 int32_t* order);

}  // namespace spade_fast
