// Writes the values of the sorted entries to the results, and the start of each bucket, which a
// binary search finds. One thread per entry or start.

#include "places.h"

namespace spade_fast {
namespace {

// The last of `count` segments that begins at or before a number; `begin` says where one begins.
template <typename Begin>
__device__ const Segment& segment_at(const Segment* segments, uint32_t count, uint32_t number,
                                     Begin&& begin) {
  const Segment* segment = segments + count - 1;
  while (number < begin(*segment)) --segment;
  return *segment;
}

// The number of the segment's entries in lower buckets.
__device__ uint32_t entries_before(const Entries& sorted, const Segment& segment, uint32_t bucket) {
  uint32_t begin = segment.entry, end = begin + segment.entries;
  while (begin < end) {
    const uint32_t middle = begin + (end - begin) / 2;
    if (sorted.buckets[middle] < bucket) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin - segment.entry;
}

// The first blocks write entries, the others starts.
__global__ void __launch_bounds__(kThreads)
    place_sorted_kernel(Results results, Entries sorted, uint32_t entry_blocks) {
  if (blockIdx.x < entry_blocks) {
    const uint32_t entry = blockIdx.x * kThreads + threadIdx.x;
    if (entry >= results.entries) return;
    const Segment& segment = segment_at(results.segments, results.lists + results.orders, entry,
                                        [](const Segment& other) { return other.entry; });
    results.memory[segment.sorted + (entry - segment.entry)] = sorted.values[entry];
    return;
  }
  const uint32_t bucket = (blockIdx.x - entry_blocks) * kThreads + threadIdx.x;
  if (bucket >= results.starts) return;
  const Segment& segment = segment_at(results.segments, results.lists, bucket,
                                      [](const Segment& other) { return other.bucket; });
  const uint32_t before = entries_before(sorted, segment, bucket);
  results.memory[segment.starts + (bucket - segment.bucket)] = before;
  if (bucket - segment.bucket == segment.buckets) results.memory[segment.ends] = before;
}

}  // namespace

void place_sorted(Stream stream, const Results& results, const Entries& sorted) {
  const int64_t entry_blocks = divide_up(results.entries, kThreads),
                start_blocks = divide_up(results.starts, kThreads);
  launch(place_sorted_kernel, entry_blocks + start_blocks, dim3(kThreads), 0, stream, results,
         sorted, static_cast<uint32_t>(entry_blocks));
}

}  // namespace spade_fast
