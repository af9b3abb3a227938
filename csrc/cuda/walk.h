// Which elements a thread has, the numbers of their planes, and sums over a block.
#pragma once

#include "elements.h"
#include "plan.h"

namespace spade_fast {

// The row that index has at a place: of the table, whatever the number, for nobody waits to ask whether it is one.
__device__ inline int32_t row_at(const Operands& o, int64_t place) {
  const uint32_t row = static_cast<uint32_t>(__ldg(o.index + place));
  return static_cast<int32_t>(row < o.rows ? row : o.rows - 1);
}

// A number of each plane that a thread has elements of: one, or one for each of its channels.
template <int V, bool kLast>
struct PerPlane {
  static constexpr int kCount = kLast ? V : 1;
  float values[kCount];

  __device__ float operator[](int k) const { return values[kLast ? k : 0]; }
};

// V elements of a thread: in row `row` of an image (a channel's plane, or a pixel), from `start` on.
struct Place {
  int64_t image, row, start;
  Span span;

  __device__ char* in(const Rows& rows) const { return rows.at(image, row, start); }
};

// A thread's part of a tensor: of one plane, or V channels of one image; the items [begin, end) are those of the block.
template <int V, bool kLast>
struct Part {
  int64_t image, channel, begin, end;
  int64_t pixels;
  int channels;  // that exist
  bool vector;

  __device__ Part(const Operands& o, const Division& d) : pixels(o.shape.pixels), vector(o.vector) {
    const uint32_t units = static_cast<uint32_t>(d.units), splits = static_cast<uint32_t>(d.splits);
    const uint32_t unit = d.units_first ? blockIdx.x % units : blockIdx.x / splits;
    begin = split(d) * d.split_items;
    end = begin + d.split_items < d.items ? begin + d.split_items : d.items;
    const uint32_t columns = blockDim.x, all = static_cast<uint32_t>(o.shape.channels);
    const uint32_t units_of_image = kLast ? (all + V * columns - 1) / (V * columns) : all;
    image = unit / units_of_image;
    channel = kLast ? (unit % units_of_image * columns + threadIdx.x) * V : unit % units_of_image;
    channels = kLast ? limited(all - channel) : 1;
  }

  static __device__ int64_t split(const Division& d) {
    return d.units_first ? blockIdx.x / static_cast<uint32_t>(d.units) : blockIdx.x % static_cast<uint32_t>(d.splits);
  }

  static __device__ int limited(int64_t count) { return count < 0 ? 0 : count < V ? static_cast<int>(count) : V; }

  // The elements at an item; none beyond the end. Where rows begin anywhere, a warp has the elements of a strip by turns.
  __device__ Place at(int64_t item) const {
    if (kLast) return {image, item, channel, {1, item < end ? channels : 0, vector}};
    const int64_t strip = item * 32 * V;
    const int64_t start = strip + threadIdx.x * (vector ? V : 1), left = item < end ? pixels - start : 0;
    if (vector) return {image, channel, start, {1, limited(left), true}};
    return {image, channel, start, {32, limited((left + 31) / 32), false}};
  }

  // Numbers of these planes, from numbers of all.
  __device__ PerPlane<V, kLast> numbers(const Operands& o, const float* all, int64_t which) const {
    const float* first = all + (which * o.shape.images + image) * o.shape.channels + channel;
    PerPlane<V, kLast> result = {};
    if (!kLast) {
      result.values[0] = __ldg(first);
    } else if (vector && channels == V) {
#pragma unroll
      for (int k = 0; k < PerPlane<V, kLast>::kCount; k += 4) {
        const float4 four = __ldg(reinterpret_cast<const float4*>(first + k));
        const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) result.values[(k + i) % PerPlane<V, kLast>::kCount] = values[i];
      }
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (k < channels) result.values[k % PerPlane<V, kLast>::kCount] = __ldg(first + k);
      }
    }
    return result;
  }

  // The other way; one thread of the block for each plane does it.
  __device__ void store_numbers(const Operands& o, float* all, int64_t which, const PerPlane<V, kLast>& numbers) const {
    if (threadIdx.y != 0 || (!kLast && threadIdx.x != 0)) return;
    float* first = all + (which * o.shape.images + image) * o.shape.channels + channel;
#pragma unroll
    for (int k = 0; k < PerPlane<V, kLast>::kCount; ++k) {
      if (k < channels) first[k] = numbers.values[k];
    }
  }
};

// Over all items of a block: each of the warps in one order, then the warps in one order.
template <int V, bool kLast>
__device__ PerPlane<V, kLast> block_sum(const float (&values)[V], float* scratch) {
  constexpr int kCount = PerPlane<V, kLast>::kCount;
  PerPlane<V, kLast> sums = {};
#pragma unroll
  for (int k = 0; k < V; ++k) sums.values[kLast ? k : 0] += values[k];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, warps = blockDim.x * blockDim.y / 32;
  const int columns = kLast ? blockDim.x : 1, column = kLast ? threadIdx.x : 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    for (int lanes = columns; lanes < 32; lanes *= 2) sums.values[k] += __shfl_xor_sync(~0u, sums.values[k], lanes);
    if (thread % 32 < columns) scratch[(thread / 32 * kCount + k) * columns + column] = sums.values[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    sums.values[k] = 0;
    for (int warp = 0; warp < warps; ++warp) sums.values[k] += scratch[(warp * kCount + k) * columns + column];
  }
  __syncthreads();  // scratch may be used again
  return sums;
}

// Over all items of a unit, which the blocks of a cluster share: each finds its own sum, then all add them up in one order.
template <int V, bool kLast>
__device__ PerPlane<V, kLast> unit_sum(const Division& d, const float (&values)[V], float* scratch) {
  constexpr int kCount = PerPlane<V, kLast>::kCount;
  PerPlane<V, kLast> sums = block_sum<V, kLast>(values, scratch);
  if (d.splits == 1) return sums;
  const int columns = kLast ? blockDim.x : 1, column = kLast ? threadIdx.x : 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if (threadIdx.y == 0 && (kLast || threadIdx.x == 0)) scratch[k * columns + column] = sums.values[k];
    sums.values[k] = 0;
  }
  wait_for_cluster();
  for (uint32_t block = 0; block < d.splits; ++block) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) sums.values[k] += in_block(block, scratch + k * columns + column);
  }
  wait_for_cluster();  // scratch may be used again, and the block may end
  return sums;
}

// What is found of 32 planes over all splits, by a block of 32 × 32 threads: each warp has 32 planes, which are side by side in memory, of
// every 32nd split, four of them under way; then each has one plane, and combines what the warps found. The order is always the same.
template <typename Found, typename Load>
__device__ Found over_splits(int64_t splits, Load&& load_split) {
  constexpr int kUnderWay = 4;
  Found all = {};
  for (int64_t first = threadIdx.y; first < splits; first += kUnderWay * 32) {
    Found found[kUnderWay] = {};
#pragma unroll
    for (int i = 0; i < kUnderWay; ++i) {
      if (first + i * 32 < splits) found[i] = load_split(first + i * 32);
    }
#pragma unroll
    for (int i = 0; i < kUnderWay; ++i) all = combined(all, found[i]);
  }
  Found* scratch = reinterpret_cast<Found*>(shared_memory());
  scratch[threadIdx.y * 33 + threadIdx.x] = all;
  __syncthreads();
  all = scratch[threadIdx.x * 33 + threadIdx.y];
  for (int lanes = 16; lanes > 0; lanes /= 2) all = combined(all, shuffled(all, lanes));
  return all;
}

}  // namespace spade_fast
