// The elements of each thread, the numbers of their planes, and reductions over a block.
#pragma once

#include "elements.h"
#include "plan.h"

namespace spade_fast {

// A row of the table, clamped, because checking the index would make the host wait.
__device__ inline uint32_t row_of(const Operands& o, uint32_t number) {
  return number < o.rows ? number : o.rows - 1;
}
__device__ inline uint32_t row_at(const Operands& o, const int32_t* index) {
  return row_of(o, static_cast<uint32_t>(__ldg(index)));
}

// One number per plane of a thread's elements: a single one, or one for each of its V channels.
template <int V, bool kLast>
struct PerPlane {
  static constexpr int kCount = kLast ? V : 1;
  float values[kCount];

  __device__ float operator[](int k) const { return values[kLast ? k : 0]; }
};

// Loads the number of one channel, or of the channels of a span, from the numbers of all planes.
template <int V, bool kLast>
__device__ PerPlane<V, kLast> numbers_of(const Operands& o, const float* all, int64_t which,
                                         int64_t image, int64_t channel, Span span) {
  const float* first = all + (which * o.shape.images + image) * o.shape.channels + channel;
  PerPlane<V, kLast> result = {};
  if (!kLast) {
    result.values[0] = __ldg(first);
  } else if (span.vector && span.count == V) {
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
      if (k < span.count) result.values[k % PerPlane<V, kLast>::kCount] = __ldg(first + k);
    }
  }
  return result;
}

// A thread's positions in all operands, for one image: from a channel on, or in a channel's plane.
template <bool kLast>
struct Cursors {
  const Operands& o;
  int64_t image, channel;
  Cursor x, dy, gamma, beta;
  const int32_t* index;
  uint8_t* signs;  // of the plane, or of these channels at the first pixel
  uint32_t signs_step;

  __device__ Cursors(const Operands& o, int64_t image, int64_t channel)
      : o(o),
        image(image),
        channel(channel),
        x(in(o.x)),
        dy(in(o.dy)),
        gamma(modulation(o.gamma)),
        beta(modulation(o.beta)),
        index(o.index + image * o.shape.pixels) {
    signs_step = static_cast<uint32_t>((kLast ? o.shape.channels : o.shape.pixels) + 7) / 8;
    signs = o.signs + (kLast ? image * o.shape.pixels * signs_step + channel / 8
                             : (image * o.shape.channels + channel) * signs_step);
  }

  __device__ Cursor in(const Rows& rows) const {
    return kLast ? rows.rows_from(image, channel) : rows.elements_from(image, channel);
  }
  __device__ Cursor modulation(const Rows& rows) const {
    return o.index != nullptr ? rows.rows_from(0, channel) : in(rows);
  }
};

// V elements of a thread, in a plane or at a pixel.
struct Elements {
  uint32_t item;   // their position for cursors: the place of the first in the plane, or the pixel
  uint32_t start;  // the place of the first in its row: in the plane, or among the channels
  Span span;
};

template <int V>
__device__ Raw load(const Cursor& from, const Elements& elements) {
  return load<V>(from.at(elements.item), from.type, elements.span);
}

template <int V>
__device__ void store(const Cursor& to, const Elements& elements, const float (&values)[V]) {
  store<V>(to.at(elements.item), to.type, elements.span, values);
}

// A thread's part of a tensor: in one plane, or V channels of one image. The items [begin, end) are
// those of the block. kWhole: every vector has either V elements or none.
template <int V, bool kLast, bool kWhole>
struct Part {
  int64_t image, channel;
  uint32_t begin, end, pixels;
  int channels;  // that exist
  bool vector;

  __device__ Part(const Operands& o, const Division& d)
      : pixels(static_cast<uint32_t>(o.shape.pixels)), vector(kWhole || o.vector) {
    const uint32_t units = static_cast<uint32_t>(d.units), splits = static_cast<uint32_t>(d.splits);
    const uint32_t unit = d.units_first ? blockIdx.x % units : blockIdx.x / splits;
    const uint32_t items = static_cast<uint32_t>(d.items),
                   split_items = static_cast<uint32_t>(d.split_items);
    begin = static_cast<uint32_t>(split(d)) * split_items;
    end = begin + split_items < items ? begin + split_items : items;
    const uint32_t columns = blockDim.x, all = static_cast<uint32_t>(o.shape.channels);
    const uint32_t units_of_image = kLast ? (all + V * columns - 1) / (V * columns) : all;
    image = unit / units_of_image;
    channel = kLast ? (unit % units_of_image * columns + threadIdx.x) * V : unit % units_of_image;
    channels = kLast ? limited(all - channel) : 1;
  }

  static __device__ int64_t split(const Division& d) {
    return d.units_first ? blockIdx.x / static_cast<uint32_t>(d.units)
                         : blockIdx.x % static_cast<uint32_t>(d.splits);
  }

  static __device__ int limited(int64_t count) {
    if (kWhole) return count > 0 ? V : 0;
    return count < 0 ? 0 : count < V ? static_cast<int>(count) : V;
  }

  // The elements at an item; none beyond the end. If rows are not aligned, the lanes of a warp take
  // the elements of a strip in turn, so that their loads are coalesced.
  __device__ Elements at(uint32_t item) const {
    if (kLast)
      return {item, static_cast<uint32_t>(channel), {1, item < end ? channels : 0, vector}};
    const uint32_t start = item * 32 * V + threadIdx.x * (vector ? V : 1);
    const int64_t left = item < end ? static_cast<int64_t>(pixels) - start : 0;
    if (vector) return {start, start, {1, limited(left), true}};
    return {start, start, {32, limited((left + 31) / 32), false}};
  }

  // Loads this part's numbers from those of all planes.
  __device__ PerPlane<V, kLast> numbers(const Operands& o, const float* all, int64_t which) const {
    return numbers_of<V, kLast>(o, all, which, image, channel, {1, channels, vector});
  }

  // Stores them; one thread of the block does it for each plane.
  __device__ void store_numbers(const Operands& o, float* all, int64_t which,
                                const PerPlane<V, kLast>& numbers) const {
    if (threadIdx.y != 0 || (!kLast && threadIdx.x != 0)) return;
    float* first = all + (which * o.shape.images + image) * o.shape.channels + channel;
#pragma unroll
    for (int k = 0; k < PerPlane<V, kLast>::kCount; ++k) {
      if (k < channels) first[k] = numbers.values[k];
    }
  }
};

// Sums values over all items of a block, into the first numbers of scratch: within each warp by
// shuffles, then over the warps with one thread per number, in a fixed order. Returns the number of
// sums.
template <int V, bool kLast>
__device__ int sum_in_scratch(const float (&values)[V], float* scratch) {
  constexpr int kCount = PerPlane<V, kLast>::kCount;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  const int columns = kLast ? blockDim.x : 1, column = kLast ? threadIdx.x : 0,
            numbers = columns * kCount;
  PerPlane<V, kLast> sums = {};
#pragma unroll
  for (int k = 0; k < V; ++k) sums.values[kLast ? k : 0] += values[k];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    for (int lanes = columns; lanes < 32; lanes *= 2)
      sums.values[k] += __shfl_xor_sync(~0u, sums.values[k], lanes);
    if (thread % 32 < columns)
      scratch[thread / 32 * numbers + column * kCount + k] = sums.values[k];
  }
  __syncthreads();
  for (int number = thread; number < numbers; number += threads) {
    float sum = 0;
    for (int warp = 0; warp < threads / 32; ++warp) sum += scratch[warp * numbers + number];
    scratch[number] = sum;
  }
  return numbers;
}

// Loads this thread's sums, which others stored before a barrier.
template <int V, bool kLast>
__device__ PerPlane<V, kLast> read_scratch(const float* scratch) {
  PerPlane<V, kLast> sums;
#pragma unroll
  for (int k = 0; k < PerPlane<V, kLast>::kCount; ++k)
    sums.values[k] = scratch[(kLast ? threadIdx.x : 0) * PerPlane<V, kLast>::kCount + k];
  __syncthreads();  // scratch may be used again
  return sums;
}

template <int V, bool kLast>
__device__ PerPlane<V, kLast> block_sum(const float (&values)[V], float* scratch) {
  sum_in_scratch<V, kLast>(values, scratch);
  __syncthreads();
  return read_scratch<V, kLast>(scratch);
}

// The same over all items of a unit, which the blocks of a cluster share. Each block computes its
// own sums, then all of them add up the sums of all blocks in a fixed order. The result goes behind
// a block's own sums, which other blocks still read.
template <int V, bool kLast>
__device__ PerPlane<V, kLast> unit_sum(const Division& d, const float (&values)[V],
                                       float* scratch) {
  if (d.splits == 1) return block_sum<V, kLast>(values, scratch);
  const int numbers = sum_in_scratch<V, kLast>(values, scratch);
  wait_for_cluster();
  for (int number = threadIdx.y * blockDim.x + threadIdx.x; number < numbers;
       number += blockDim.x * blockDim.y) {
    float sum = 0;
#pragma unroll 4
    for (uint32_t block = 0; block < d.splits; ++block) sum += in_block(block, scratch + number);
    scratch[numbers + number] = sum;
  }
  wait_for_cluster();  // scratch may be used again, and the block may end
  return read_scratch<V, kLast>(scratch + numbers);
}

// Combines 32 planes over all splits, with a block of 32 × 32 threads. Each warp first combines
// every 32nd split of the 32 planes, one plane per lane, with four loads in flight; then, after a
// transposition through shared memory, the warps' results of one plane. The order is fixed.
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
