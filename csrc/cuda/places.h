// Device functions that each thread calls for its place: find an equal place, and number the places
// that are the first of their kind.
#pragma once

#include "numbering.h"
#include "scan.h"

namespace spade_fast {

// A volatile load: other threads may store there meanwhile, so the compiler must not reuse a value
// that was loaded before.
__device__ inline uint32_t load_now(const uint32_t* from) {
  return *static_cast<const volatile uint32_t*>(from);
}

__device__ inline uint32_t mixed(uint32_t hash, uint32_t value) {
  hash = (hash ^ value) * 0x9e3779b1u;
  return hash ^ hash >> 15;
}

// The slot of a place: the one that holds an equal place, or a free slot, which it claims. Tables
// are at most half full, so probing ends.
template <typename IsSame>
__device__ uint32_t slot_of(const Level& level, uint32_t place, uint32_t hash, IsSame&& is_same) {
  for (uint32_t slot = hash & level.hash_mask & (level.slots - 1);;
       slot = (slot + 1) & (level.slots - 1)) {
    uint32_t other = load_now(level.table + slot);
    if (other == kNone) other = atomicCAS(level.table + slot, kNone, place);
    if (other == kNone || is_same(other)) return slot;
  }
}

// Lowers the first place of a slot. Most places come after an equal one, so the load avoids most
// atomics.
__device__ inline void note_first(const Level& level, uint32_t slot, uint32_t place) {
  if (load_now(level.firsts + slot) > place) atomicMin(level.firsts + slot, place);
}

// The number of a first place within its section; only after add_up.
__device__ inline uint32_t number_of(const Level& level, uint32_t first) {
  const Word word = level.words[first / 32];
  const uint32_t before = Counts::firsts(level.chunks[first / kThreads]) + word.before;
  return before + __popc(word.is_first & ((1u << first % 32) - 1));
}

// Replaces the slot of this thread's place by the first place, and counts the block's first places
// and their taps. All threads of the block must call it, even if their place does not exist.
__device__ inline void resolve(const Level& level, uint32_t place, bool exists, uint32_t taps) {
  uint32_t first = kNone;
  if (exists) level.equals[place] = first = level.firsts[level.equals[place]];
  const bool is_first = exists && first == place;
  const uint32_t bits = __ballot_sync(~0u, is_first);
  uint64_t all;
  const uint64_t own = is_first ? Counts::of(1, taps) : 0;
  const uint64_t before = scan_block(own, reinterpret_cast<uint64_t*>(shared_memory()), &all) - own;
  if (threadIdx.x % 32 == 0) level.words[place / 32] = {bits, Counts::firsts(before)};
  if (threadIdx.x == 0) level.chunks[blockIdx.x] = all;
}

}  // namespace spade_fast
