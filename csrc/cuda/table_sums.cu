// dγ and dβ of a table: for each of its rows the sums over the pixels that have it, always in the same order.
//
// Pixels sorted by their row are cut into pieces of one row and at most kPiece pixels. A block sums a piece, then each row's pieces are
// summed. With d = x − shift a piece has Σg and Σg·d, whence dβ = Σg and dγ = scale·Σg·d + offset·Σg, and for the planes, with the
// row's γ, Σq = (1 + γ)·Σg and Σq·d = (1 + γ)·Σg·d: no other pass over x. How many pieces there are stays on the device.

#include "kernels.h"
#include "modulation.h"

namespace spade_fast {
namespace {

constexpr int64_t kPieceThreads = 128;  // most pieces have few pixels

// A place among the sorted pixels of all images.
struct Sorted {
  int64_t image, position;
  int32_t row;
  bool exists, begins_row, ends_row, begins_piece;
};

// The pixel that order has at a place: one that there is, whatever the number.
__device__ int64_t pixel_at(const Operands& o, const Pieces& pieces, int64_t at) {
  const uint32_t pixel = static_cast<uint32_t>(__ldg(pieces.order + at)), pixels = static_cast<uint32_t>(o.shape.pixels);
  return pixel < pixels ? pixel : pixels - 1;
}

__device__ Sorted sorted_at(const Operands& o, const Pieces& pieces, int64_t at) {
  const int64_t pixels = o.shape.pixels;
  Sorted place = {at / pixels, at % pixels, -1, at < o.shape.images * pixels, false, false, false};
  if (!place.exists) return place;
  const auto row_of = [&](int64_t other) { return row_at(o, place.image * pixels + pixel_at(o, pieces, other)); };
  place.row = row_of(at);
  place.begins_row = place.position == 0 || row_of(at - 1) != place.row;
  place.ends_row = place.position == pixels - 1 || row_of(at + 1) != place.row;
  place.begins_piece = place.begins_row || place.position % kPiece == 0;
  return place;
}

// The sum of the block's values up to this thread's, and of all.
__device__ int block_scan(int value, int* all) {
  int* of_warps = reinterpret_cast<int*>(shared_memory());
  const int lane = threadIdx.x % 32, mine = threadIdx.x / 32;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int before = __shfl_up_sync(~0u, value, lanes);
    if (lane >= lanes) value += before;
  }
  if (lane == 31) of_warps[mine] = value;
  __syncthreads();
  *all = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x / 32); ++warp) {
    if (warp == mine) value += *all;
    *all += of_warps[warp];
  }
  __syncthreads();
  return value;
}

__global__ void __launch_bounds__(kPlaces) count_pieces_kernel(Operands o, Pieces pieces) {
  int all;
  block_scan(sorted_at(o, pieces, blockIdx.x * kPlaces + threadIdx.x).begins_piece, &all);
  if (threadIdx.x == 0) pieces.counts[blockIdx.x] = all;
}

__global__ void __launch_bounds__(kPlaces) scan_counts_kernel(Pieces pieces, int64_t blocks) {
  int before = 0;
  for (int64_t first = 0; first < blocks; first += kPlaces) {
    const int64_t block = first + threadIdx.x;
    const int count = block < blocks ? pieces.counts[block] : 0;
    int all;
    const int scanned = block_scan(count, &all);
    if (block < blocks) pieces.counts[block] = before + scanned - count;
    before += all;
  }
}

__global__ void __launch_bounds__(kPlaces) list_pieces_kernel(Operands o, Pieces pieces) {
  const int64_t at = blockIdx.x * kPlaces + threadIdx.x;
  const Sorted place = sorted_at(o, pieces, at);
  int all;
  const int64_t found = pieces.counts[blockIdx.x] + block_scan(place.begins_piece, &all) - 1;
  const int piece = static_cast<int>(found < pieces.most ? found : pieces.most - 1);  // more there are not where order is sorted
  if (!place.exists) return;
  if (place.begins_piece) pieces.firsts[piece] = at, pieces.piece_rows[piece] = place.row;
  int32_t* range = pieces.ranges + 2 * (place.image * pieces.rows + place.row);
  if (place.begins_row) range[0] = piece;
  if (place.ends_row) range[1] = piece + 1;
  if (place.position == 0) pieces.image_firsts[place.image] = piece;
  if (at == o.shape.images * o.shape.pixels - 1) pieces.firsts[piece + 1] = at + 1, pieces.image_firsts[o.shape.images] = piece + 1;
}

// A thread has V channels of every so many-th pixel of the piece.
template <int V, bool kLast>
__device__ void sum_piece(const Operands& o, const Pieces& pieces, int64_t piece, uint32_t channel_block) {
  const int64_t channels = o.shape.channels, pixels = o.shape.pixels;
  const int64_t begin = pieces.firsts[piece], end = pieces.firsts[piece + 1], image = begin / pixels;
  const int64_t channel = (channel_block * blockDim.x + threadIdx.x) * V, row = pieces.piece_rows[piece];
  const int count = Part<V, true>::limited(channels - channel);
  const Span in_row = {1, count, o.vector};
  PerPlane<V, true> shift = {}, scale = {}, offset = {};
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (k >= count) continue;
    const float* plane = o.planes + image * channels + channel + k;
    const int64_t planes = o.shape.images * channels;
    shift.values[k] = __ldg(plane), scale.values[k] = __ldg(plane + planes), offset.values[k] = __ldg(plane + 2 * planes);
  }
  Modulation modulation = {};
  if (o.activation == Activation::silu) {
    modulation.gamma = load<V>(o.gamma.at(0, row, channel), o.gamma.type, in_row);
    modulation.beta = load<V>(o.beta.at(0, row, channel), o.beta.type, in_row);
  }
  float g_sum[V] = {}, g_deviation_sum[V] = {};
  for (int64_t at = begin + threadIdx.y; at < end; at += blockDim.y) {
    const int64_t pixel = pixel_at(o, pieces, at);
    const auto channels_of = [&](const Rows& rows) {
      if (kLast) return load<V>(rows.at(image, pixel, channel), rows.type, in_row);
      return load<V>(rows.at(image, channel, pixel), rows.type, {rows.row, count, false});
    };
    const Raw x = channels_of(o.x), dy = channels_of(o.dy);
    uint32_t signs = 0;
    if (kLast) {
      signs = load_signs<V, true>(o, {image, pixel, channel, in_row});
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) signs |= load_signs<1, false>(o, {image, channel + k, pixel, {1, k < count, false}}) % 2 << k;
    }
    const Gradient<V> found = gradient<V>(o, x, dy, modulation, signs, shift, scale, offset);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      g_sum[k] += found.g[k];
      g_deviation_sum[k] += found.g[k] * found.deviation[k];
    }
  }
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const PerPlane<V, true> g = block_sum<V, true>(g_sum, scratch), g_deviation = block_sum<V, true>(g_deviation_sum, scratch);
  if (threadIdx.y != 0) return;
  float* found = pieces.found + piece * channels + channel;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (k < count) found[k] = g.values[k], found[pieces.most * channels + k] = g_deviation.values[k];
  }
}

template <int V, bool kLast>
__global__ void __launch_bounds__(kPieceThreads, 1) sum_pieces_kernel(Operands o, Pieces pieces, uint32_t channel_blocks) {
  const int64_t count = pieces.image_firsts[o.shape.images], step = gridDim.x / channel_blocks;
  for (int64_t piece = blockIdx.x / channel_blocks; piece < count; piece += step) {
    sum_piece<V, kLast>(o, pieces, piece, blockIdx.x % channel_blocks);
  }
}

// A thread has a channel of a row.
__global__ void __launch_bounds__(kThreads) sum_rows_kernel(Operands o, Pieces pieces, uint32_t channel_blocks, Rows dgamma, Rows dbeta) {
  const int64_t row = blockIdx.x / channel_blocks, channel = blockIdx.x % channel_blocks * blockDim.x + threadIdx.x;
  const int64_t channels = o.shape.channels;
  if (channel >= channels) return;
  float g_sum = 0, g_normalised_sum = 0;
  for (int64_t image = 0; image < o.shape.images; ++image) {
    const float *scale = o.planes + (o.shape.images + image) * channels + channel, *offset = scale + o.shape.images * channels;
    const int32_t* range = pieces.ranges + 2 * (image * pieces.rows + row);
    const int64_t begin = range[0], end = range[1];
#pragma unroll 4
    for (int64_t piece = begin; piece < end; ++piece) {
      const float* found = pieces.found + piece * channels + channel;
      const float g = __ldg(found), g_deviation = __ldg(found + pieces.most * channels);
      g_sum += g;
      g_normalised_sum += *scale * g_deviation + *offset * g;
    }
  }
  store_one(dgamma.at(0, row, channel), g_normalised_sum, dgamma.type);
  store_one(dbeta.at(0, row, channel), g_sum, dbeta.type);
}

// A thread has a channel of every so many-th piece of this split of an image's.
__global__ void __launch_bounds__(kThreads) sum_planes_kernel(Operands o, Pieces pieces, uint32_t channel_blocks, int64_t splits,
                                                              float* parts) {
  const int64_t channels = o.shape.channels, split = blockIdx.x % splits, unit = blockIdx.x / splits;
  const int64_t image = unit / channel_blocks, channel = unit % channel_blocks * blockDim.x + threadIdx.x;
  const int64_t first = pieces.image_firsts[image], count = pieces.image_firsts[image + 1] - first;
  const int64_t split_pieces = (count + splits - 1) / splits, begin = first + split * split_pieces;
  const int64_t end = begin + split_pieces < first + count ? begin + split_pieces : first + count;
  float q_sum[1] = {}, q_deviation_sum[1] = {};
  if (channel < channels) {
#pragma unroll 2
    for (int64_t piece = begin + threadIdx.y; piece < end; piece += blockDim.y) {
      float one_plus[4];
      unpack<4>(load<4>(o.gamma.at(0, __ldg(pieces.piece_rows + piece), channel), o.gamma.type, {1, 1, false}), o.gamma.type, one_plus);
      const float* found = pieces.found + piece * channels + channel;
      q_sum[0] += (1 + one_plus[0]) * __ldg(found);
      q_deviation_sum[0] += (1 + one_plus[0]) * __ldg(found + pieces.most * channels);
    }
  }
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const PerPlane<1, true> q = block_sum<1, true>(q_sum, scratch), q_deviation = block_sum<1, true>(q_deviation_sum, scratch);
  if (threadIdx.y != 0 || channel >= channels) return;
  const int64_t all = o.shape.images * channels, plane = image * channels + channel;
  parts[2 * split * all + plane] = q.values[0];
  parts[(2 * split + 1) * all + plane] = q_deviation.values[0];
}

}  // namespace

void table_sums(const Settings& settings, const Operands& o, const Pieces& pieces, int64_t splits, const Rows& dgamma, const Rows& dbeta,
                float* parts) {
  const Stream stream = settings.stream;
  const int64_t channels = o.shape.channels, blocks = divide_up(o.shape.images * o.shape.pixels, kPlaces);
  launch(count_pieces_kernel, blocks, dim3(kPlaces), kPlaces / 8, stream, o, pieces);
  launch(scan_counts_kernel, 1, dim3(kPlaces), kPlaces / 8, stream, pieces, blocks);
  launch(list_pieces_kernel, blocks, dim3(kPlaces), kPlaces / 8, stream, o, pieces);
  specialised(settings, [&](auto vector, auto last) {
    const int columns = columns_of(divide_up(channels, vector())), lanes = kPieceThreads / columns;
    const int64_t channel_blocks = divide_up(channels, columns * vector());
    const int64_t blocks_of_channels = std::min(pieces.most, divide_up(4 * kBlocks * processors(), std::max<int64_t>(1, channel_blocks)));
    launch(sum_pieces_kernel<vector(), last()>, blocks_of_channels * channel_blocks, dim3(columns, lanes),
           columns * lanes / 8 * columns * vector(), stream, o, pieces, static_cast<uint32_t>(channel_blocks));
  });
  const int64_t row_blocks = divide_up(channels, 128), plane_blocks = divide_up(channels, 32);
  launch(sum_rows_kernel, pieces.rows * row_blocks, dim3(128), 0, stream, o, pieces, static_cast<uint32_t>(row_blocks), dgamma, dbeta);
  launch(sum_planes_kernel, o.shape.images * plane_blocks * splits, dim3(32, 8), 8 * 32 * 4, stream, o, pieces,
         static_cast<uint32_t>(plane_blocks), splits, parts);
}

}  // namespace spade_fast
