// Numbers the windows of a map: places whose windows have equal contents get the same number. Works
// on NumPy memory, without the GIL.
//
// A window of k taps per axis is numbered axis by axis: first every run of k neighbours along the
// first axis, then every run of k of those numbers along the second, and so on. Two windows are
// equal exactly if their runs are equal in every step, so only k numbers are ever compared, never
// kᵈ.

#include "windows.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <numeric>
#include <utility>

#include "distinct.h"
#include "ranges.h"
#include "runs.h"
#include "vector.h"

namespace spade_fast {
namespace {

constexpr int32_t kOutside = -1;         // a tap beyond the border; no number in the map
constexpr int64_t kThreadPlaces = 8192;  // fewer are not worth waking a thread

int64_t places_of(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<int64_t>());
}

int64_t taps_of(const std::vector<int64_t>& shape, int64_t k) {
  int64_t taps = 1;
  for (size_t axis = 1; axis < shape.size(); ++axis) taps *= k;
  return taps;
}

// The positions of numbers from 0 to bound − 1, sorted by number.
void sort_positions(const int32_t* numbers, int64_t count, int64_t bound, int32_t* sorted) {
  if (bound > 4 * count + 1024) {  // too many possible numbers for a counting sort
    std::iota(sorted, sorted + count, 0);
    std::stable_sort(sorted, sorted + count,
                     [&](int32_t one, int32_t other) { return numbers[one] < numbers[other]; });
    return;
  }
  std::vector<int32_t> next(bound + 1, 0);
  for (int64_t i = 0; i < count; ++i) ++next[numbers[i] + 1];
  std::partial_sum(next.begin(), next.end(), next.begin());
  for (int64_t i = 0; i < count; ++i) sorted[next[numbers[i]]++] = static_cast<int32_t>(i);
}

uint64_t hash_run(int64_t k, const int32_t* run) {
  uint64_t hash = 0;
  for (int64_t t = 0; t < k; ++t)
    hash = (hash ^ static_cast<uint32_t>(run[t])) * 0x9e3779b97f4a7c15u, hash ^= hash >> 29;
  return hash;
}

// Numbers the runs of k along one axis of a map [outer, length, inner], and returns the runs
// [number, k].
std::vector<int32_t> number_axis(const int32_t* map, int64_t outer, int64_t length, int64_t inner,
                                 int64_t k, uint64_t hash_mask, int32_t* numbers) {
  Distinct<int32_t> runs(k, hash_mask);
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
      std::fill(differs.begin(), differs.end(), 0);
      for (int64_t t = 0; t < k; ++t) {
        const int64_t neighbour = l + t - k / 2;
        taps[t] = inner == 1                            ? padded.data() + t
                  : neighbour < 0 || neighbour >= lines ? nothing.data()
                                                        : map + (o * lines + neighbour) * line;
        vectorised<MarkChanges<int32_t>>(line, taps[t], differs.data());
      }
      for_each_run(differs.data(), line, [&](int64_t first, int64_t last) {
        for (int64_t t = 0; t < k; ++t) run[t] = taps[t][first];
        const int32_t number = runs.number(run.data(), hash_run(k, run.data())).first;
        std::fill(numbers + start + first, numbers + start + last, number);
      });
    }
  }
  return runs.rows();
}

// The contents of windows [number, taps · k], given their runs along the last axis and the contents
// […, taps] of what the runs consist of.
std::vector<int32_t> contents_of(const std::vector<int32_t>& runs, int64_t k,
                                 const std::vector<int32_t>& parts, int64_t taps) {
  std::vector<int32_t> contents(runs.size() * taps, kOutside);
  for (size_t run = 0; run < runs.size(); run += k) {
    for (int64_t t = 0; t < k; ++t) {
      if (runs[run + t] == kOutside) continue;
      for (int64_t tap = 0; tap < taps; ++tap)
        contents[run * taps + tap * k + t] = parts[runs[run + t] * taps + tap];
    }
  }
  return contents;
}

// Numbers the windows of one map, the windows of these windows, and lists both.
void find_windows(int64_t k, int64_t rows, MapWindows* found) {
  std::vector<int32_t> first(places_of(found->shape));
  const std::vector<int32_t> hidden =
      number_windows(found->codes, found->shape, k, ~uint64_t{0}, first.data());
  const std::vector<int32_t> table =
      number_windows(first.data(), found->shape, k, ~uint64_t{0}, found->index);
  const int64_t taps = taps_of(found->shape, k), hidden_count = hidden.size() / taps,
                count = table.size() / taps;
  // What is addressed with is checked, not the codes, which another thread may be editing.
  found->wrong = out_of_range("contents", hidden.data(), hidden.size(), kOutside, rows);
  if (!countable(std::max(hidden_count, count), taps))
    found->wrong = "codes has " + std::to_string(std::max(hidden_count, count)) +
                   " distinct windows of " + std::to_string(taps) +
                   " taps; together they should be below 2147483647";
  if (!found->wrong.empty()) return;
  window_sums(hidden.data(), hidden_count, taps, rows, found->hidden);
  window_sums(table.data(), count, taps, hidden_count, found->table);
  sort_pixels(found->index, found->shape, count, found->order);
}

}  // namespace

std::vector<int32_t> number_windows(const int32_t* map, const std::vector<int64_t>& shape,
                                    int64_t k, uint64_t hash_mask, int32_t* numbers) {
  const int64_t places = places_of(shape), axes = shape.size() - 1;
  if (places == 0) return {};
  std::vector<int32_t> between(axes > 1 ? places : 0), contents;
  int64_t outer = shape[0], inner = places / outer, taps = 1;
  for (int64_t axis = 1; axis <= axes; ++axis) {
    inner /= shape[axis];
    int32_t* to = (axes - axis) % 2 == 0 ? numbers : between.data();
    std::vector<int32_t> runs = number_axis(map, outer, shape[axis], inner, k, hash_mask, to);
    contents = axis == 1 ? std::move(runs) : contents_of(runs, k, contents, taps);
    outer *= shape[axis], taps *= k, map = to;
  }
  return contents;
}

void find_windows(int64_t k, int64_t rows, std::vector<MapWindows>* maps) {
  std::vector<MapWindows*> largest_first;
  int64_t places = 0;
  for (MapWindows& one : *maps) {
    largest_first.push_back(&one);
    places += places_of(one.shape);
  }
  std::stable_sort(largest_first.begin(), largest_first.end(), [](auto* one, auto* other) {
    return places_of(one->shape) > places_of(other->shape);
  });
  const int64_t threads =
      std::min<int64_t>({torch::stable::get_num_threads(), static_cast<int64_t>(maps->size()),
                         1 + places / kThreadPlaces});
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t i; (i = next++) < largest_first.size();) find_windows(k, rows, largest_first[i]);
  });
}

void sort_pixels(const int32_t* index, const std::vector<int64_t>& shape, int64_t bound,
                 int32_t* order) {
  const int64_t pixels = shape[0] == 0 ? 0 : places_of(shape) / shape[0];
  for (int64_t n = 0; n < shape[0]; ++n)
    sort_positions(index + n * pixels, pixels, bound, order + n * pixels);
}

void window_sums(const int32_t* contents, int64_t windows, int64_t taps, int64_t rows,
                 std::vector<int32_t>* lists) {
  std::vector<int32_t>&offsets = lists[0], &listed = lists[1], &back_offsets = lists[2],
  &back_listed = lists[3];
  listed.resize(windows * taps);
  offsets.assign(windows + 1, 0);
  back_offsets.assign(rows * taps + 2, 0);
  int32_t seen = 0;
  for (int64_t window = 0; window < windows; ++window) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int32_t row = contents[window * taps + tap];
      if (row == kOutside) continue;
      listed[seen] = static_cast<int32_t>(row * taps + tap);
      ++back_offsets[listed[seen++] + 2];
    }
    offsets[window + 1] = seen;
  }
  listed.resize(seen);
  back_listed.resize(seen);
  // Until the lists are filled, the offset of an entry's list is one place too far, and moves to
  // the list's end.
  std::partial_sum(back_offsets.begin(), back_offsets.end(), back_offsets.begin());
  for (int32_t window = 0; window < windows; ++window) {
    for (int32_t i = offsets[window]; i < offsets[window + 1]; ++i)
      back_listed[back_offsets[listed[i] + 1]++] = window;
  }
  back_offsets.pop_back();
}

}  // namespace spade_fast
