// A stable radix sort of entries by bucket, 8 bits per pass from the lowest on.
//
// A block sorts one tile of entries. An entry goes behind all entries with lower digits, which were
// counted for all passes when the entries were written, and behind those with the same digit in
// earlier tiles. The latter come from a decoupled look-back: a tile publishes its own counts, then
// goes back over the earlier tiles' counts to one that has published its inclusive prefix. Each
// pass reads and writes the entries once. Tiles are numbered in the order in which blocks start, so
// that no block waits for one that has not started.

#include "places.h"

namespace spade_fast {
namespace {

constexpr int kItems = kSortTile / kThreads;
constexpr int kWarps = kThreads / 32;
// The flags of a published count: the tile's own, or that of all tiles up to it.
constexpr uint32_t kOwn = 1u << 30, kAll = 2u << 30;

// The number of entries with this digit in earlier tiles; this tile has `own`.
__device__ uint32_t count_before(uint32_t* said, uint32_t tile, uint32_t digit, uint32_t own) {
  const auto say = [&](uint32_t what) { store_now(said + tile * kDigits + digit, what); };
  if (tile > 0) say(kOwn | own);
  uint32_t before = 0;
  for (uint32_t other = tile; other-- > 0;) {
    uint32_t what = 0;
    while (what == 0) what = load_now(said + other * kDigits + digit);
    before += what & (kOwn - 1);
    if (what & kAll) break;
  }
  say(kAll | (before + own));
  return before;
}

struct Shared {
  uint32_t of_warps[kWarps * kDigits];  // entries per warp and digit; then those of earlier warps
  // Where each digit begins in the tile, and its distance from there to its place in the result.
  uint32_t starts[kDigits], targets[kDigits];
  uint32_t buckets[kSortTile], values[kSortTile], scratch[kWarps], tile;
};

__global__ void __launch_bounds__(kThreads, 4)
    sort_digit_kernel(Sorting s, int pass, Entries from, Entries to) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  for (int warp = 0; warp < kWarps; ++warp) shared.of_warps[warp * kDigits + threadIdx.x] = 0;
  const uint32_t tile = draw_ticket(s.tickets + pass, &shared.tile), first = tile * kSortTile,
                 lane = threadIdx.x % 32;
  uint32_t* own_warp = shared.of_warps + threadIdx.x / 32 * kDigits;
  uint32_t bucket[kItems], value[kItems], rank[kItems];
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const uint32_t at = first + (threadIdx.x / 32 * kItems + item) * 32 + lane;
    const bool exists = at < s.count;
    bucket[item] = exists ? from.buckets[at] : 0, value[item] = exists ? from.values[at] : 0;
    const uint32_t digit = digit_of(bucket[item], pass);
    const uint32_t same = __match_any_sync(~0u, digit) & __ballot_sync(~0u, exists),
                   before = same & ((1u << lane) - 1);
    rank[item] = own_warp[digit] + __popc(before);
    __syncwarp();
    if (exists && before == 0) own_warp[digit] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  {
    const uint32_t digit = threadIdx.x;
    uint32_t count = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      uint32_t& of_warp = shared.of_warps[warp * kDigits + digit];
      const uint32_t own = of_warp;
      of_warp = count;
      count += own;
    }
    const uint32_t before =
        count_before(s.said + static_cast<int64_t>(pass) * s.tiles * kDigits, tile, digit, count);
    uint32_t all;
    const uint32_t start = scan_block(count, shared.scratch, &all) - count,
                   of_all = s.counts[pass * kDigits + digit];
    shared.starts[digit] = start;
    // This scan's barriers also make the starts visible.
    shared.targets[digit] = scan_block(of_all, shared.scratch, &all) - of_all + before - start;
  }
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const uint32_t digit = digit_of(bucket[item], pass),
                   at = shared.starts[digit] + own_warp[digit] + rank[item];
    if (first + (threadIdx.x / 32 * kItems + item) * 32 + lane < s.count)
      shared.buckets[at] = bucket[item], shared.values[at] = value[item];
  }
  __syncthreads();
  for (uint32_t at = threadIdx.x; at < kSortTile && first + at < s.count; at += kThreads) {
    const uint32_t target = shared.targets[digit_of(shared.buckets[at], pass)] + at;
    to.buckets[target] = shared.buckets[at], to.values[target] = shared.values[at];
  }
}

}  // namespace

void sort_entries(Stream stream, const Sorting& sorting) {
  for (int pass = 0; pass < sorting.passes; ++pass)
    launch(sort_digit_kernel, sorting.tiles, dim3(kThreads), sizeof(Shared), stream, sorting, pass,
           sorting.sides[pass % 2], sorting.sides[(pass + 1) % 2]);
}

}  // namespace spade_fast
