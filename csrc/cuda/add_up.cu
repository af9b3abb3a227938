// Per section and level of a numbering, the exclusive prefix sums of the chunks' counts, and their
// totals. A block scans one section of one level, kThreads chunks at a time.

#include "places.h"

namespace spade_fast {
namespace {

struct Levels {
  uint64_t* chunks[kLevels];
};

// One block per section and level.
__global__ void __launch_bounds__(kThreads)
    add_up_kernel(const Section* sections, uint32_t section_count, Levels levels, int level_count,
                  const uint32_t* is_wrong, uint64_t* totals) {
  const Section& section = sections[blockIdx.x / level_count];
  const uint32_t first = section.first / kThreads,
                 count = (section.count + kThreads - 1) / kThreads;
  uint64_t* chunks = (blockIdx.x % level_count == 0 ? levels.chunks[0] : levels.chunks[1]) + first;
  uint64_t before = 0;
  for (uint32_t begin = 0; begin < count; begin += kThreads) {
    const uint32_t chunk = begin + threadIdx.x;
    const uint64_t own = chunk < count ? chunks[chunk] : 0;
    uint64_t all;
    const uint64_t scanned = scan_block(own, reinterpret_cast<uint64_t*>(shared_memory()), &all);
    if (chunk < count) chunks[chunk] = before + scanned - own;
    before += all;
  }
  if (threadIdx.x != 0) return;
  totals[blockIdx.x] = before;
  if (blockIdx.x == 0) totals[section_count * level_count] = *is_wrong;
}

}  // namespace

void add_up(Stream stream, const Section* sections, uint32_t section_count, const Level* levels,
            int level_count, const uint32_t* is_wrong, uint64_t* totals) {
  Levels given = {};
  for (int level = 0; level < level_count; ++level) given.chunks[level] = levels[level].chunks;
  launch(add_up_kernel, static_cast<int64_t>(section_count) * level_count, dim3(kThreads),
         kScanScratch, stream, sections, section_count, given, level_count, is_wrong, totals);
}

}  // namespace spade_fast
