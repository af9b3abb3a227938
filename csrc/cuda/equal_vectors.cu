// Finds the pixels of a condition [N, C, pixels] whose vectors are equal, bit for bit: gives each
// pixel the slot of its vector in a hash table, and each slot its first pixel.
//
// A block handles 32 pixels, one per lane; its warps divide the channels between them. So the loads
// of a warp are coalesced, and all channels of a vector are in flight at once. A vector is compared
// with that of its slot right after it was read, while it is still in the cache.

#include "places.h"

namespace spade_fast {
namespace {

constexpr int kPixels = 32;
constexpr int kWarps = kThreads / kPixels;

template <typename Bits>
__device__ const Bits* vector_at(const Vectors& vectors, uint32_t place) {
  const int64_t image = place / vectors.pixels, pixel = place % vectors.pixels;
  return static_cast<const Bits*>(vectors.elements) + image * vectors.channels * vectors.pixels +
         pixel;
}

// The hash of this warp's channels of a vector. The hashes of channels are added, so their order
// does not matter.
template <typename Bits>
__device__ uint32_t hash_of(const Vectors& vectors, const Bits* vector) {
  uint32_t hash = 0;
#pragma unroll 8
  for (uint32_t channel = threadIdx.y; channel < vectors.channels; channel += kWarps) {
    const uint64_t bits = __ldg(vector + static_cast<int64_t>(channel) * vectors.pixels);
    const uint32_t low = static_cast<uint32_t>(bits), high = static_cast<uint32_t>(bits >> 32);
    // Mixed once more: a difference in the highest bit, the sign, reaches only few bits at a time.
    hash += mixed(mixed(mixed(channel, low), high), 0);
  }
  return hash;
}

template <typename Bits>
__device__ bool differ(const Vectors& vectors, const Bits* one, const Bits* other) {
  bool found = false;
#pragma unroll 8
  for (uint32_t channel = threadIdx.y; channel < vectors.channels; channel += kWarps) {
    const int64_t at = static_cast<int64_t>(channel) * vectors.pixels;
    found |= __ldg(one + at) != __ldg(other + at);
  }
  return found;
}

// All warps agree on the state of every pixel.
template <typename Bits>
__global__ void __launch_bounds__(kThreads)
    equal_vectors_kernel(Vectors vectors, uint32_t places, Level level) {
  uint32_t *of_warps = reinterpret_cast<uint32_t*>(shared_memory()), *others = of_warps + kThreads;
  const uint32_t lane = threadIdx.x, warp = threadIdx.y, place = blockIdx.x * kPixels + lane;
  bool is_open = place < places;
  const Bits* vector = vector_at<Bits>(vectors, is_open ? place : 0);
  of_warps[warp * kPixels + lane] = is_open ? hash_of(vectors, vector) : 0;
  __syncthreads();
  uint32_t hash = 0;
  for (int other = 0; other < kWarps; ++other) hash += of_warps[other * kPixels + lane];
  uint32_t slot = mixed(0, hash) & level.hash_mask & (level.slots - 1);
  while (__ballot_sync(~0u, is_open) != 0) {
    if (warp == 0) {
      uint32_t other = is_open ? ~load_now(level.table + slot) : kNone;
      if (is_open && other == kNone) other = ~atomicCAS(level.table + slot, ~kNone, ~place);
      others[lane] = other;
    }
    __syncthreads();
    const uint32_t other = others[lane];
    const bool compares = is_open && other != kNone;
    const uint32_t different =
        __ballot_sync(~0u, compares && differ(vectors, vector, vector_at<Bits>(vectors, other)));
    if (lane == 0) of_warps[warp] = different;
    __syncthreads();
    uint32_t all = 0;
    for (int one = 0; one < kWarps; ++one) all |= of_warps[one];
    is_open = compares && (all >> lane & 1) != 0;
    if (is_open) slot = (slot + 1) & (level.slots - 1);
  }
  if (warp != 0 || place >= places) return;
  note_first(level, slot, place);
  level.equals[place] = slot;
}

// The last block adds up the counts of the others.
__global__ void __launch_bounds__(kThreads) resolve_vectors_kernel(uint32_t places, Level level) {
  const uint32_t block = draw_ticket(level.tickets, reinterpret_cast<uint32_t*>(shared_memory()));
  if (block + 1 < gridDim.x) {
    resolve(level, block, block * kThreads + threadIdx.x < places, 0);
  } else {
    add_up(level, 0, places, 0);
  }
}

__global__ void __launch_bounds__(kThreads)
    number_vectors_kernel(uint32_t places, Level level, int32_t* codes, int64_t* first_places) {
  const uint32_t place = blockIdx.x * kThreads + threadIdx.x;
  if (place >= places) return;
  const uint32_t first = level.equals[place], number = number_of(level, first);
  codes[place] = number;
  if (first == place) first_places[number] = place;
}

}  // namespace

void find_equal_vectors(Stream stream, const Vectors& vectors, uint32_t places,
                        const Level& level) {
  const auto launch_for = [&](auto kernel) {
    launch(kernel, divide_up(places, kPixels), dim3(kPixels, kWarps),
           (kThreads + kPixels) * sizeof(uint32_t), stream, vectors, places, level);
  };
  switch (vectors.size) {
    case 2:
      return launch_for(equal_vectors_kernel<uint16_t>);
    case 4:
      return launch_for(equal_vectors_kernel<uint32_t>);
    default:
      return launch_for(equal_vectors_kernel<unsigned long long>);
  }
}

void resolve_vectors(Stream stream, uint32_t places, const Level& level) {
  launch(resolve_vectors_kernel, divide_up(places, kThreads) + 1, dim3(kThreads), kScanScratch,
         stream, places, level);
}

void number_vectors(Stream stream, uint32_t places, const Level& level, int32_t* codes,
                    int64_t* first_places) {
  launch(number_vectors_kernel, divide_up(places, kThreads), dim3(kThreads), 0, stream, places,
         level, codes, first_places);
}

}  // namespace spade_fast
