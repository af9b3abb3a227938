// Numbers the windows of a map: places whose windows have equal contents get the same number. Works
// on NumPy memory, without the GIL.
//
// A window of k taps per axis is numbered axis by axis: first every run of k neighbours along the
// first axis, then every run of k of those numbers along the second, and so on. Two windows are
// equal exactly if their runs are equal in every step, so only k numbers are ever compared, never
// kᵈ.

#include "windows.h"

#include <algorithm>
#include <numeric>

#include "distinct.h"

namespace spade_fast {
namespace {

constexpr int32_t kOutside = -1;  // a tap beyond the border; no number in the map

uint64_t hash_run(int64_t k, const int32_t* run) {
  uint64_t hash = 0;
  for (int64_t t = 0; t < k; ++t)
    hash = (hash ^ static_cast<uint32_t>(run[t])) * 0x9e3779b97f4a7c15u, hash ^= hash >> 29;
  return hash;
}

// Numbers the runs of k along one axis of a map [outer, length, inner]; `firsts` receives the first
// place of each number.
void number_axis(const int32_t* map, int64_t outer, int64_t length, int64_t inner, int64_t k,
                 uint64_t hash_mask, int32_t* numbers, std::vector<int64_t>* firsts) {
  Distinct<int32_t> runs(k, hash_mask);
  firsts->clear();
  // A line is a contiguous run of elements: along the axis if inner is 1, else across it.
  const int64_t line = inner == 1 ? length : inner, lines = inner == 1 ? 1 : length;
  const std::vector<int32_t> nothing(line, kOutside);
  std::vector<int32_t> padded(line + k - 1, kOutside), run(k);
  std::vector<const int32_t*> taps(k);
  std::vector<uint8_t> differs(line);
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t l = 0; l < lines; ++l) {
      const int64_t start = (o * lines + l) * line;
      if (inner == 1) std::copy_n(map + start, line, padded.begin() + k / 2);
      for (int64_t t = 0; t < k; ++t) {
        const int64_t neighbour = l + t - k / 2;
        taps[t] = inner == 1                            ? padded.data() + t
                  : neighbour < 0 || neighbour >= lines ? nothing.data()
                                                        : map + (o * lines + neighbour) * line;
      }
      // Most runs equal their predecessor, so compare with that first.
      std::fill(differs.begin(), differs.end(), 0);
      for (int64_t t = 0; t < k; ++t) {
        const int32_t* tap = taps[t];
        for (int64_t i = 1; i < line; ++i) differs[i] |= tap[i] != tap[i - 1];
      }
      int32_t number = kOutside;
      for (int64_t i = 0; i < line; ++i) {
        if (i == 0 || differs[i]) {
          for (int64_t t = 0; t < k; ++t) run[t] = taps[t][i];
          const auto [found, is_new] = runs.number(run.data(), hash_run(k, run.data()));
          if (is_new) firsts->push_back(start + i);
          number = found;
        }
        numbers[start + i] = number;
      }
    }
  }
}

}  // namespace

Numbered number_windows(const int32_t* map, const std::vector<int64_t>& shape, int64_t k,
                        uint64_t hash_mask) {
  int64_t places = 1;
  for (const int64_t size : shape) places *= size;
  Numbered result{};
  std::vector<int64_t> firsts;
  std::vector<int32_t> before;
  const int32_t* from = map;
  int64_t outer = shape[0], inner = places / std::max<int64_t>(1, shape[0]);
  for (size_t axis = 1; axis < shape.size(); ++axis) {
    inner /= std::max<int64_t>(1, shape[axis]);
    result.numbers.resize(places);
    if (places > 0)
      number_axis(from, outer, shape[axis], inner, k, hash_mask, result.numbers.data(), &firsts);
    outer *= shape[axis];
    if (axis + 1 < shape.size()) {
      before.swap(result.numbers);
      from = before.data();
    }
  }
  // The contents of each window, read at the first place that has it.
  const int64_t axes = shape.size() - 1;
  int64_t taps = 1;
  for (int64_t axis = 0; axis < axes; ++axis) taps *= k;
  result.windows = static_cast<int64_t>(firsts.size()), result.taps = taps;
  result.contents.assign(firsts.size() * taps, kOutside);
  std::vector<int64_t> position(axes);
  for (size_t number = 0; number < firsts.size(); ++number) {
    int64_t rest = firsts[number];
    for (int64_t axis = axes; axis-- > 0; rest /= shape[axis + 1])
      position[axis] = rest % shape[axis + 1];
    for (int64_t tap = 0; tap < taps; ++tap) {
      int64_t place = firsts[number], stride = 1, digits = tap;
      bool inside = true;
      for (int64_t axis = axes; axis-- > 0; stride *= shape[axis + 1], digits /= k) {
        const int64_t shift = digits % k - k / 2, there = position[axis] + shift;
        inside = inside && there >= 0 && there < shape[axis + 1];
        place += shift * stride;
      }
      if (inside) result.contents[number * taps + tap] = map[place];
    }
  }
  return result;
}

void sort_positions(const int32_t* numbers, int64_t count, int64_t bound, int32_t* sorted) {
  std::vector<int32_t> starts;
  if (bound <= 4 * count + 1024) return sort_by_number(numbers, count, bound, &starts, sorted);
  std::iota(sorted, sorted + count, 0);  // too many possible numbers for a counting sort
  std::stable_sort(sorted, sorted + count,
                   [&](int32_t one, int32_t other) { return numbers[one] < numbers[other]; });
}

void sort_by_number(const int32_t* numbers, int64_t count, int64_t bound,
                    std::vector<int32_t>* starts, int32_t* sorted) {
  starts->assign(bound + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    if (numbers[i] >= 0) ++(*starts)[numbers[i] + 1];
  }
  for (int64_t number = 0; number < bound; ++number) (*starts)[number + 1] += (*starts)[number];
  std::vector<int32_t> next(starts->begin(), starts->end());
  for (int64_t i = 0; i < count; ++i) {
    if (numbers[i] >= 0) sorted[next[numbers[i]]++] = static_cast<int32_t>(i);
  }
}

void window_sums(const int32_t* contents, int64_t windows, int64_t taps, int64_t rows,
                 std::vector<int32_t>* lists) {
  std::vector<int32_t>&offsets = lists[0], &listed = lists[1], &back_offsets = lists[2],
  &back_listed = lists[3];
  std::vector<int32_t> flat(windows * taps, kOutside);
  offsets.assign(1, 0);
  for (int64_t window = 0; window < windows; ++window) {
    for (int64_t place = window * taps; place < (window + 1) * taps; ++place) {
      if (contents[place] == kOutside) continue;
      flat[place] = static_cast<int32_t>(contents[place] * taps + place % taps);
      listed.push_back(flat[place]);
    }
    offsets.push_back(static_cast<int32_t>(listed.size()));
  }
  back_listed.resize(listed.size());
  sort_by_number(flat.data(), windows * taps, rows * taps, &back_offsets, back_listed.data());
  for (int32_t& place : back_listed) place /= static_cast<int32_t>(taps);
}

}  // namespace spade_fast
