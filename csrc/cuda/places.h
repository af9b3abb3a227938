// Device functions that each thread calls for its place: find an equal place, and number the places
// that are the first of their kind.
#pragma once

#include "numbering.h"
#include "scan.h"

namespace spade_fast {

// Volatile accesses: other threads may access the same memory meanwhile, so the compiler must
// neither reuse a value that was loaded before nor defer a store.
template <typename T>
__device__ T load_now(const T* from) {
  return *static_cast<const volatile T*>(from);
}
template <typename T>
__device__ void store_now(T* to, T value) {
  *static_cast<volatile T*>(to) = value;
}

// The number of blocks that started before this one, which may wait for any of those. `shared`
// holds it until the next barrier.
__device__ inline uint32_t draw_ticket(uint32_t* tickets, uint32_t* shared) {
  if (threadIdx.x == 0) *shared = atomicAdd(tickets, 1u);
  __syncthreads();
  return *shared;
}

__device__ inline uint32_t digit_of(uint32_t bucket, int pass) {
  return bucket >> pass * kDigitBits & (kDigits - 1);
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
    uint32_t other = ~load_now(level.table + slot);
    if (other == kNone) other = ~atomicCAS(level.table + slot, ~kNone, ~place);
    if (other == kNone || is_same(other)) return slot;
  }
}

// Lowers the first place of a slot. Most places come after an equal one, so the load avoids most
// atomics.
__device__ inline void note_first(const Level& level, uint32_t slot, uint32_t place) {
  if (~load_now(level.firsts + slot) > place) atomicMax(level.firsts + slot, ~place);
}

// The number of a first place within its section; only after add_up.
__device__ inline uint32_t number_of(const Level& level, uint32_t first) {
  const Word word = level.words[first / 32];
  const uint32_t before = Counts::firsts(level.chunks[first / kThreads]) + word.before;
  return before + __popc(word.is_first & ((1u << first % 32) - 1));
}

// Replaces the slot of this thread's place by the first place, and publishes the counts of the
// chunk's first places and their taps. All threads of the block must call it, even if their place
// does not exist.
__device__ inline void resolve(const Level& level, uint32_t chunk, bool exists, uint32_t taps) {
  const uint32_t place = chunk * kThreads + threadIdx.x;
  uint32_t first = kNone;
  if (exists) level.equals[place] = first = ~level.firsts[level.equals[place]];
  const bool is_first = exists && first == place;
  const uint32_t bits = __ballot_sync(~0u, is_first);
  uint64_t all;
  const uint64_t own = is_first ? Counts::of(1, taps) : 0;
  const uint64_t before = scan_block(own, reinterpret_cast<uint64_t*>(shared_memory()), &all) - own;
  if (threadIdx.x % 32 == 0) level.words[place / 32] = {bits, Counts::firsts(before)};
  if (threadIdx.x == 0) store_now(level.chunks + chunk, all | Counts::kSaid);
}

// Replaces the counts of a section's chunks by the sums of those before, kThreads chunks at a time,
// as soon as other blocks have published them; and writes their total.
__device__ inline void add_up(const Level& level, uint32_t first, uint32_t places,
                              uint32_t section) {
  uint64_t* chunks = level.chunks + first / kThreads;
  uint64_t before = 0;
  for (uint32_t begin = 0; begin * kThreads < places; begin += kThreads) {
    const uint32_t chunk = begin + threadIdx.x;
    const bool exists = chunk * kThreads < places;
    uint64_t own = 0, all;
    while (exists && own == 0) own = load_now(chunks + chunk);
    own &= ~Counts::kSaid;
    const uint64_t scanned = scan_block(own, reinterpret_cast<uint64_t*>(shared_memory()), &all);
    if (exists) store_now(chunks + chunk, before + scanned - own);
    before += all;
  }
  if (threadIdx.x == 0) level.totals[section] = before;
}

}  // namespace spade_fast
