// dγ and dβ of a table, and the sums Σq and Σq·(x − shift) of the planes: each row's gradient is a
// sum over the pixels that have this row, in a fixed order.
//
// The pixels, sorted by row, are cut into pieces of at most kPiece pixels of one row. Threads with
// adjacent channels sum Σg and D = Σ g·(x − shift) of a piece. From those follow, with the row's
// factor f = addend + γ and the plane's scale and offset,
//
//     dβ = Σg,  dγ = scale·D + offset·Σg,  Σq = f·Σg,  Σq·(x − shift) = f·D,
//
// so the planes need no other pass over x. A row with a single piece is finished at once; the
// others are summed from their pieces by sum_rows_kernel. The number of pieces stays on the device,
// so the host never waits.

#include "kernels.h"
#include "modulation.h"
#include "scan.h"

namespace spade_fast {
namespace {

// Threads per block of sum_rows_kernel: 32 columns of four channels, and 8 lanes at different
// pieces.
constexpr int64_t kRowThreads = 256;

// A place in the sorted order of all images' pixels.
struct Sorted {
  uint32_t image, position;
  int32_t row;
  bool exists, begins_row, ends_row, begins_piece;
};

// The pixel at a place of `order`, clamped, because `order` is not checked.
__device__ uint32_t pixel_at(const Operands& o, const Pieces& pieces, int64_t at) {
  const uint32_t pixel = static_cast<uint32_t>(__ldg(pieces.order + at)),
                 pixels = static_cast<uint32_t>(o.shape.pixels);
  return pixel < pixels ? pixel : pixels - 1;
}

__device__ Sorted sorted_at(const Operands& o, const Pieces& pieces, int64_t at) {
  const uint32_t pixels = static_cast<uint32_t>(o.shape.pixels),
                 place_of_all = static_cast<uint32_t>(at);
  Sorted place = {place_of_all / pixels,
                  place_of_all % pixels,
                  -1,
                  at < o.shape.images * pixels,
                  false,
                  false,
                  false};
  if (!place.exists) return place;
  const int32_t* index = o.index + static_cast<int64_t>(place.image) * pixels;
  const auto row_of = [&](int64_t other) {
    return static_cast<int32_t>(row_at(o, index + pixel_at(o, pieces, other)));
  };
  place.row = row_of(at);
  place.begins_row = place.position == 0 || row_of(at - 1) != place.row;
  place.ends_row = place.position == pixels - 1 || row_of(at + 1) != place.row;
  place.begins_piece = place.begins_row || place.position % kPiece == 0;
  return place;
}

__device__ int scan(int value, int* all) {
  return scan_block(value, reinterpret_cast<int*>(shared_memory()), all);
}

__global__ void __launch_bounds__(kPlaces) count_pieces_kernel(Operands o, Pieces pieces) {
  int all;
  scan(sorted_at(o, pieces, blockIdx.x * kPlaces + threadIdx.x).begins_piece, &all);
  if (threadIdx.x == 0) pieces.counts[blockIdx.x] = all;
}

__global__ void __launch_bounds__(kPlaces) scan_counts_kernel(Pieces pieces, int64_t blocks) {
  int before = 0;
  for (int64_t first = 0; first < blocks; first += kPlaces) {
    const int64_t block = first + threadIdx.x;
    const int count = block < blocks ? pieces.counts[block] : 0;
    int all;
    const int scanned = scan(count, &all);
    if (block < blocks) pieces.counts[block] = before + scanned - count;
    before += all;
  }
}

__global__ void __launch_bounds__(kPlaces) list_pieces_kernel(Operands o, Pieces pieces) {
  const int64_t at = blockIdx.x * kPlaces + threadIdx.x;
  const Sorted place = sorted_at(o, pieces, at);
  int all;
  const int64_t found = pieces.counts[blockIdx.x] + scan(place.begins_piece, &all) - 1;
  // Beyond `most` only if `order` is not sorted.
  const int piece = static_cast<int>(found < pieces.most ? found : pieces.most - 1);
  if (!place.exists) return;
  if (place.begins_piece) {
    pieces.firsts[piece] = static_cast<int32_t>(at), pieces.piece_rows[piece] = place.row;
    // The last slot may then hold two pieces: count it twice, so that it finishes no row alone.
    add_atomically(pieces.row_pieces + place.row, found < pieces.most - 1 ? 1 : 2);
  }
  int32_t* range = pieces.ranges + 2 * (place.row * o.shape.images + place.image);
  if (place.begins_row) range[0] = piece;
  if (place.ends_row) range[1] = piece + 1;
  if (place.position == 0) pieces.image_firsts[place.image] = piece;
  if (at < o.shape.images * o.shape.pixels - 1) return;
  pieces.firsts[piece + 1] = static_cast<int32_t>(at + 1),
                        pieces.image_firsts[o.shape.images] = piece + 1;
}

// Assigns a slot in `found` to each piece that shares its row. Slots may differ from run to run,
// but what the pieces store does not.
__global__ void __launch_bounds__(kThreads) place_pieces_kernel(Pieces pieces, int64_t images) {
  const int32_t piece = blockIdx.x * kThreads + threadIdx.x;
  if (piece >= pieces.image_firsts[images]) return;
  const bool has_others = pieces.row_pieces[pieces.piece_rows[piece]] > 1;
  const int32_t place = has_others ? add_atomically(pieces.taken, 1) : 0;
  pieces.places[piece] = has_others && place < pieces.kept ? place : kNotKept;
}

// Whether vectors of channels can be loaded at once from arrays with contiguous channels (tables
// and numbers per plane), whatever the layout of x.
__device__ bool channels_together(const Operands& o) {
  return o.vector && o.shape.channels % 4 == 0;
}

// V channels of an image, for the threads that sum pieces.
template <int V, bool kLast, bool kWhole>
struct Channels {
  Cursors<kLast> in;
  Span span;
  PerPlane<V, true> shift;

  __device__ Channels(const Operands& o, int64_t image, int64_t first)
      : in(o, image, first),
        span{1, Part<V, true, kWhole>::limited(o.shape.channels - first),
             kWhole || channels_together(o)},
        shift(numbers(0)) {}

  __device__ PerPlane<V, true> numbers(int64_t which) const {
    return numbers_of<V, true>(in.o, in.o.planes, which, in.image, in.channel, span);
  }
};

template <int V>
struct PieceSums {
  float g[V], g_deviation[V];  // Σg and Σg·(x − shift)
};

// The sums over the pixels at places [begin, end).
template <int V, bool kLast, bool kWhole, bool kSilu>
__device__ PieceSums<V> sum_pixels(const Operands& o, const Pieces& pieces,
                                   const Channels<V, kLast, kWhole>& channels, uint32_t row,
                                   uint32_t begin, uint32_t end) {
  constexpr int kUnderWay = kLast ? 2 : 8 / V;  // pixels in flight
  const Cursors<kLast>& in = channels.in;
  GammaBeta modulation = {};
  PerPlane<V, true> scale = {}, offset = {};
  if (kSilu) {
    scale = channels.numbers(1), offset = channels.numbers(2);
    modulation.gamma = load<V>(in.gamma.at(row), o.gamma.type, channels.span);
    modulation.beta = load<V>(in.beta.at(row), o.beta.type, channels.span);
  }
  const auto load_pixel = [&](const Rows& rows, const Cursor& from, uint32_t pixel) {
    const Span span = kLast ? channels.span : Span{rows.row, channels.span.count, false};
    return load<V>(from.at(pixel), from.type, span);
  };
  const auto load_pixel_signs = [&](uint32_t pixel) {
    if (kLast) return load_signs<V>(in, {pixel, static_cast<uint32_t>(in.channel), channels.span});
    uint32_t signs = 0;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Elements place = {pixel, pixel, {1, k < channels.span.count, false}};
      Cursors<kLast> of_channel = in;
      of_channel.signs += k * in.signs_step;
      signs |= (load_signs<1>(of_channel, place) & 1u) << k;
    }
    return signs;
  };
  PieceSums<V> sums = {};
  for (uint32_t at = begin; at < end; at += kUnderWay) {
    Raw x[kUnderWay], dy[kUnderWay];
    uint32_t signs[kUnderWay];
#pragma unroll
    for (int i = 0; i < kUnderWay; ++i) {
      const uint32_t pixel = pixel_at(o, pieces, at + i < end ? at + i : at);
      x[i] = load_pixel(o.x, in.x, pixel), dy[i] = load_pixel(o.dy, in.dy, pixel),
      signs[i] = load_pixel_signs(pixel);
    }
#pragma unroll
    for (int i = 0; i < kUnderWay; ++i) {
      if (at + i >= end) continue;
      const Gradient<V> found =
          gradient<V, kSilu>(o, x[i], dy[i], modulation, signs[i], channels.shift, scale, offset);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        sums.g[k] += found.g[k];
        sums.g_deviation[k] += found.g[k] * found.deviation[k];
      }
    }
  }
  return sums;
}

struct Piece {
  uint32_t begin, end, row;
};

__device__ Piece piece_at(const Pieces& pieces, uint32_t piece) {
  const auto number = [](const int32_t* from) { return static_cast<uint32_t>(__ldg(from)); };
  return {number(pieces.firsts + piece), number(pieces.firsts + piece + 1),
          number(pieces.piece_rows + piece)};
}

// A block handles one split of an image's pieces and some of its channels; each of its lanes sums
// one piece at a time. Each thread accumulates the sums of the planes in shared memory of its own,
// and the block adds them up at the end.
template <int V, bool kLast, bool kWhole, bool kSilu>
__global__ void __launch_bounds__(kThreads, kLast && kWhole && !kSilu ? 3 : 2)
    sum_pieces_kernel(Operands o, Pieces pieces, uint32_t channel_blocks, uint32_t splits,
                      Rows dgamma, Rows dbeta, float* parts) {
  const uint32_t unit = blockIdx.x / splits, split = blockIdx.x % splits, columns = blockDim.x,
                 lanes = blockDim.y;
  const int64_t image = unit / channel_blocks,
                block_channel = static_cast<int64_t>(unit % channel_blocks) * columns * V;
  const Channels<V, kLast, kWhole> channels(o, image, block_channel + threadIdx.x * V);
  const uint32_t begin = pieces.image_firsts[image], end = pieces.image_firsts[image + 1];
  float* q_sums = reinterpret_cast<float*>(shared_memory());  // [lanes, columns, V], twice
  float *mine = q_sums + (threadIdx.y * columns + threadIdx.x) * V,
        *mine_with_deviation = mine + kThreads * V;
#pragma unroll
  for (int k = 0; k < V; ++k) mine[k] = mine_with_deviation[k] = 0;
  for (uint32_t piece = begin + split * lanes + threadIdx.y; piece < end; piece += splits * lanes) {
    const Piece found = piece_at(pieces, piece);
    const PieceSums<V> sums =
        sum_pixels<V, kLast, kWhole, kSilu>(o, pieces, channels, found.row, found.begin, found.end);
    const int32_t of_row = __ldg(pieces.row_pieces + found.row);
    float factor[V];
    const Raw gamma = load<V>(channels.in.gamma.at(found.row), o.gamma.type, channels.span);
    unpack<V>(gamma, o.gamma.type, factor);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      factor[k] += o.addend;
      mine[k] += factor[k] * sums.g[k];
      mine_with_deviation[k] += factor[k] * sums.g_deviation[k];
    }
    if (of_row == 1) {
      const auto scale = channels.numbers(1), offset = channels.numbers(2);
      float normalised[V];
#pragma unroll
      for (int k = 0; k < V; ++k)
        normalised[k] = scale[k] * sums.g_deviation[k] + offset[k] * sums.g[k];
      store<V>(dgamma.at(0, found.row, channels.in.channel), dgamma.type, channels.span,
               normalised);
      store<V>(dbeta.at(0, found.row, channels.in.channel), dbeta.type, channels.span, sums.g);
    } else if (const int32_t place = __ldg(pieces.places + piece); place != kNotKept) {
      float* kept =
          pieces.found + 2 * static_cast<int64_t>(place) * o.shape.channels + channels.in.channel;
#pragma unroll
      for (int k = 0; k < V; k += 4) {
        const Span four = {1, Part<4, true, kWhole>::limited(channels.span.count - k),
                           channels.span.vector};
        const float g[4] = {sums.g[k], sums.g[k + 1], sums.g[k + 2], sums.g[k + 3]};
        const float g_deviation[4] = {sums.g_deviation[k], sums.g_deviation[k + 1],
                                      sums.g_deviation[k + 2], sums.g_deviation[k + 3]};
        store<4>(reinterpret_cast<char*>(kept + k), Type::float32, four, g);
        store<4>(reinterpret_cast<char*>(kept + o.shape.channels + k), Type::float32, four,
                 g_deviation);
      }
    }
  }
  __syncthreads();
  const int64_t all = o.shape.images * o.shape.channels,
                thread = threadIdx.y * columns + threadIdx.x;
  for (int64_t k = thread; k < 2 * columns * V; k += kThreads) {
    const int64_t which = k / (columns * V), channel = block_channel + k % (columns * V);
    float sum = 0;
    for (uint32_t lane = 0; lane < lanes; ++lane)
      sum += q_sums[which * kThreads * V + lane * columns * V + k % (columns * V)];
    if (channel < o.shape.channels)
      parts[(kSumParts * split + which) * all + image * o.shape.channels + channel] = sum;
  }
}

// dγ and dβ of the rows that have several pieces, or none. A block handles one row at a time, with
// four channels per column; its lanes go through the row's pieces in each image. The sums of pieces
// that were not kept are computed again.
template <bool kLast, bool kWhole, bool kSilu>
__global__ void __launch_bounds__(kRowThreads, 1)
    sum_rows_kernel(Operands o, Pieces pieces, uint32_t channel_blocks, Rows dgamma, Rows dbeta) {
  const int64_t step = gridDim.x / channel_blocks, images = o.shape.images,
                channels_of_all = o.shape.channels;
  const int64_t channel = (blockIdx.x % channel_blocks * blockDim.x + threadIdx.x) * 4;
  constexpr int kUnderWay = 4;
  int32_t* ranges = reinterpret_cast<int32_t*>(shared_memory());
  float* scratch = reinterpret_cast<float*>(ranges + 2 * kRowThreads);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int64_t row = blockIdx.x / channel_blocks; row < pieces.rows; row += step) {
    if (__ldg(pieces.row_pieces + row) == 1) continue;
    float g_sum[4] = {}, g_normalised_sum[4] = {};
    for (int64_t first = 0; first < images; first += kRowThreads) {
      __syncthreads();  // all have read the ranges
      if (first + thread < images) {
        const int32_t* range = pieces.ranges + 2 * (row * images + first + thread);
        ranges[2 * thread] = __ldg(range), ranges[2 * thread + 1] = __ldg(range + 1);
      }
      __syncthreads();
      for (int64_t image = first; image < images && image < first + kRowThreads; ++image) {
        const int32_t end = ranges[2 * (image - first) + 1];
        int64_t piece = ranges[2 * (image - first)] + threadIdx.y;
        if (piece >= end) continue;
        const Channels<4, kLast, kWhole> channels(o, image, channel);
        PieceSums<4> sums = {};
        const auto add = [&](const PieceSums<4>& found) {
#pragma unroll
          for (int k = 0; k < 4; ++k)
            sums.g[k] += found.g[k], sums.g_deviation[k] += found.g_deviation[k];
        };
        const auto load_kept = [&](int32_t place) {
          const char* kept =
              reinterpret_cast<const char*>(pieces.found + 2 * place * channels_of_all + channel);
          PieceSums<4> found;
          unpack<4>(load<4>(kept, Type::float32, channels.span), Type::float32, found.g);
          unpack<4>(load<4>(kept + 4 * channels_of_all, Type::float32, channels.span),
                    Type::float32, found.g_deviation);
          return found;
        };
        for (; piece < end; piece += kUnderWay * blockDim.y) {
          int32_t places[kUnderWay];
          bool all_kept = true;
#pragma unroll
          for (int i = 0; i < kUnderWay; ++i) {
            const int64_t other = piece + i * blockDim.y;
            places[i] = __ldg(pieces.places + (other < end ? other : piece));
            all_kept = all_kept && places[i] != kNotKept;
          }
          if (all_kept) {
            PieceSums<4> found[kUnderWay];
#pragma unroll
            for (int i = 0; i < kUnderWay; ++i) found[i] = load_kept(places[i]);
#pragma unroll
            for (int i = 0; i < kUnderWay; ++i) {
              if (piece + i * blockDim.y < end) add(found[i]);
            }
            continue;
          }
          for (int64_t other = piece; other < end && other < piece + kUnderWay * blockDim.y;
               other += blockDim.y) {
            const int32_t place = __ldg(pieces.places + other);
            const Piece again = piece_at(pieces, static_cast<uint32_t>(other));
            add(place != kNotKept
                    ? load_kept(place)
                    : sum_pixels<4, kLast, kWhole, kSilu>(
                          o, pieces, channels, static_cast<uint32_t>(row), again.begin, again.end));
          }
        }
        const auto scale = channels.numbers(1), offset = channels.numbers(2);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          g_sum[k] += sums.g[k];
          g_normalised_sum[k] += scale[k] * sums.g_deviation[k] + offset[k] * sums.g[k];
        }
      }
    }
    const PerPlane<4, true> g = block_sum<4, true>(g_sum, scratch),
                            g_normalised = block_sum<4, true>(g_normalised_sum, scratch);
    if (threadIdx.y != 0) continue;
    const Span span = {1, Part<4, true, kWhole>::limited(channels_of_all - channel),
                       kWhole || channels_together(o)};
    store<4>(dgamma.at(0, row, channel), dgamma.type, span, g_normalised.values);
    store<4>(dbeta.at(0, row, channel), dbeta.type, span, g.values);
  }
}

}  // namespace

void table_sums(const Settings& settings, const Operands& o, const Pieces& pieces, int64_t splits,
                const Rows& dgamma, const Rows& dbeta, float* parts) {
  const Stream stream = settings.stream;
  const int64_t channels = o.shape.channels,
                blocks = divide_up(o.shape.images * o.shape.pixels, kPlaces);
  launch(count_pieces_kernel, blocks, dim3(kPlaces), kPlaces / 8, stream, o, pieces);
  launch(scan_counts_kernel, 1, dim3(kPlaces), kPlaces / 8, stream, pieces, blocks);
  launch(list_pieces_kernel, blocks, dim3(kPlaces), kPlaces / 8, stream, o, pieces);
  launch(place_pieces_kernel, divide_up(pieces.most, kThreads), dim3(kThreads), 0, stream, pieces,
         o.shape.images);
  specialised(settings, o, [&](auto vector, auto last, auto whole, auto is_silu) {
    const int columns = columns_of(divide_up(channels, vector()));
    const int64_t channel_blocks = divide_up(channels, columns * vector());
    launch(sum_pieces_kernel<vector(), last(), whole(), is_silu()>,
           o.shape.images * channel_blocks * splits, dim3(columns, kThreads / columns),
           2 * kThreads * vector() * 4, stream, o, pieces, static_cast<uint32_t>(channel_blocks),
           static_cast<uint32_t>(splits), dgamma, dbeta, parts);
    const int row_columns =
        static_cast<int>(std::clamp<int64_t>(power_from(divide_up(channels, 4)), 1, 32));
    const int64_t row_blocks = divide_up(channels, 4 * row_columns);
    const int64_t blocks_of_channels = std::min(
        pieces.rows, divide_up(kSweepBlocks * processors(), std::max<int64_t>(1, row_blocks)));
    launch(sum_rows_kernel<last(), whole(), is_silu()>, blocks_of_channels * row_blocks,
           dim3(row_columns, kRowThreads / row_columns),
           2 * kRowThreads * 4 + kRowThreads / 32 * 4 * row_columns * 4, stream, o, pieces,
           static_cast<uint32_t>(row_blocks), dgamma, dbeta);
  });
}

}  // namespace spade_fast
