// Sums of listed rows: sum i is Σ x[listed[j]] over list i. In backward, these are the gradients of
// all windows that see a row through a tap.
//
// Most lists are short. A group of adjacent lanes sums each, with one vector of columns per lane,
// so that the loads of a row are coalesced. But one list may contain a large part of all windows:
// longer lists are cut at the multiples of kShortList, a warp sums each piece, and sum_parts_kernel
// adds the pieces. All sums are in float32 and in a fixed order.

#include "elements.h"
#include "kernels.h"
#include "lists.h"

namespace spade_fast {
namespace {

constexpr int kLoads = 4;  // in flight per thread
// The shape of the blocks of sum_parts_kernel.
constexpr int64_t kPartThreads = 512;
constexpr int kPartColumns = 128, kPartLanes = kPartThreads / kPartColumns;

// Adds V columns of the rows that are listed at begin, begin + step, … before `end`.
template <int V, bool kVector>
__device__ void add_rows(const ListSums& s, int64_t begin, int64_t end, int step, int64_t column,
                         float (&sum)[V]) {
  const int count = s.columns - column < V ? static_cast<int>(s.columns - column) : V;
  for (int64_t first = begin; first < end; first += kLoads * step) {
    int32_t numbers[kLoads];
    Raw rows[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
      numbers[k] = first + k * step < end ? __ldg(s.lists.listed + first + k * step) : -1;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      rows[k] = {};
      if (numbers[k] < 0 || numbers[k] >= s.rows) continue;
      rows[k] = load<V>(s.x.at(0, numbers[k], column), s.x.type, {1, kVector ? V : count, kVector});
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (first + k * step >= end) continue;
      float values[V];
      unpack<V>(rows[k], s.x.type, values);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += values[j];
    }
  }
}

// The list that contains this entry of `listed`: the last that begins there or before. A warp
// searches together, 32 lists at a time.
__device__ int64_t list_with(const Lists& lists, int64_t place) {
  int64_t first = 0, left = lists.count;
  while (left > 1) {
    const int64_t step = (left + 31) / 32, mine = threadIdx.x % 32 * step;
    const int64_t begun =
        __popc(__ballot_sync(~0u, mine < left && lists.begin(first + mine) <= place));
    const int64_t skipped = begun > 0 ? (begun - 1) * step : 0;
    first += skipped;
    left = left - skipped < step ? left - skipped : step;
  }
  return first;
}

// A warp's columns, one vector per thread. A lane here is a group of threads that covers those
// columns; a warp has as many lanes as fit.
template <int V>
struct WarpColumns {
  int lane, lanes;
  int64_t column;

  __device__ WarpColumns(int64_t block, int columns)
      : lane(threadIdx.x % 32 / columns),
        lanes(32 / columns),
        column((block * columns + threadIdx.x % columns) * V) {}
};

// Stores the sum over [begin, end) of all lanes of a warp to a row of `parts`.
template <int V, bool kVector>
__device__ void sum_part(const ListSums& s, const WarpColumns<V>& own, int64_t begin, int64_t end,
                         int64_t part) {
  float sum[V] = {};
  if (own.column < s.columns)
    add_rows<V, kVector>(s, begin + own.lane, end, own.lanes, own.column, sum);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    for (int lanes = 32 / own.lanes; lanes < 32; lanes *= 2)
      sum[k] += __shfl_xor_sync(~0u, sum[k], lanes);
    if (own.lane == 0 && own.column + k < s.columns)
      s.parts[part * s.columns + own.column + k] = sum[k];
  }
}

// A long list has more entries than a piece, so at most two meet a piece: the list with its first
// entry and the list with its last.
template <int V, bool kVector>
__device__ void sum_piece(const ListSums& s, const WarpColumns<V>& own, int64_t piece) {
  const int64_t first = piece * kShortList,
                last = first + kShortList < s.lists.entries ? first + kShortList : s.lists.entries;
  int64_t begun = -1, before = -1;
#pragma unroll 1
  for (int which = 0; which < 2; ++which) {
    const int64_t list = list_with(s.lists, which == 0 ? first : last - 1);
    const int64_t begin = s.lists.begin(list), end = s.lists.begin(list + 1);
    if (list != before && end - begin > kShortList) {
      if (begin >= first) begun = list;
      sum_part<V, kVector>(s, own, begin > first ? begin : first, end < last ? end : last,
                           2 * piece + which);
    }
    before = list;
  }
  if (own.column == 0 && own.lane == 0) s.begun[piece] = static_cast<int32_t>(begun);
}

// The first warps sum one piece each, the others as many lists as they have lanes; each some
// columns.
template <bool kVector, int V>
__global__ void __launch_bounds__(kThreads, 3)
    sum_lists_kernel(ListSums s, int columns, int64_t column_blocks) {
  const int64_t warp = blockIdx.x * (kThreads / 32) + threadIdx.x / 32,
                group = warp / column_blocks;
  const WarpColumns<V> own(warp % column_blocks, columns);
  if (group < s.pieces) return sum_piece<V, kVector>(s, own, group);
  const int64_t list = (group - s.pieces) * own.lanes + own.lane;
  if (list >= s.lists.count || own.column >= s.columns) return;
  const int64_t begin = s.lists.begin(list), end = s.lists.begin(list + 1);
  if (end - begin > kShortList) return;
  float sum[V] = {};
  add_rows<V, kVector>(s, begin, end, 1, own.column, sum);
  const int count = s.columns - own.column < V ? static_cast<int>(s.columns - own.column) : V;
  store<V>(s.sums.at(0, list, own.column), s.sums.type, {1, kVector ? V : count, kVector}, sum);
}

// A block sums the parts of the long list that begins in its piece, if there is one.
__global__ void __launch_bounds__(kPartThreads) sum_parts_kernel(ListSums s) {
  const int64_t piece = blockIdx.x, list = s.begun[piece];
  if (list < 0) return;
  const int64_t begin = s.lists.begin(list), last = (s.lists.begin(list + 1) - 1) / kShortList;
  const int64_t own = begin == piece * kShortList ? 2 * piece : 2 * piece + 1;
  float* scratch = reinterpret_cast<float*>(shared_memory());
  for (int64_t column = threadIdx.x; column - threadIdx.x < s.columns; column += kPartColumns) {
    float sum = 0;
    if (column < s.columns) {
#pragma unroll 8
      for (int64_t at = piece + threadIdx.y; at <= last; at += kPartLanes) {
        sum += s.parts[(at == piece ? own : 2 * at) * s.columns + column];
      }
    }
    scratch[threadIdx.y * kPartColumns + threadIdx.x] = sum;
    __syncthreads();
    for (int lane = 1; lane < kPartLanes; ++lane) sum += scratch[lane * kPartColumns + threadIdx.x];
    if (threadIdx.y == 0 && column < s.columns)
      store_one(s.sums.at(0, list, column), sum, s.sums.type);
    __syncthreads();
  }
}

template <int V, bool kVector>
void sum_vectors(Stream stream, const ListSums& s) {
  const int columns = static_cast<int>(std::min<int64_t>(power_from(divide_up(s.columns, V)), 32));
  const int64_t column_blocks = divide_up(s.columns, columns * V),
                warps = (s.pieces + divide_up(s.lists.count, 32 / columns)) * column_blocks;
  launch(sum_lists_kernel<kVector, V>, divide_up(warps, kThreads / 32), dim3(kThreads), 0, stream,
         s, columns, column_blocks);
  launch(sum_parts_kernel, s.pieces, dim3(kPartColumns, kPartLanes), kPartThreads * 4, stream, s);
}

}  // namespace

void sum_lists(Stream stream, const ListSums& s) {
  if (s.x.type != Type::float32) {
    s.vector ? sum_vectors<8, true>(stream, s) : sum_vectors<8, false>(stream, s);
  } else {
    s.vector ? sum_vectors<4, true>(stream, s) : sum_vectors<4, false>(stream, s);
  }
}

}  // namespace spade_fast
