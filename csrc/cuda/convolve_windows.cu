// A convolution at the distinct windows of a map in half precision: result i is bias + Σ
// weight[:, :, t] · rows[r] over the pairs (r, t) that window i sees.
//
// It is an implicit GEMM on tensor cores: windows × outputs, with taps × channels as the inner
// dimension. A block computes a tile of windows and outputs in steps of 64 channels of one tap. It
// gathers the rows that its windows see into shared memory with asynchronous copies, several steps
// ahead of the products, so that no gathered matrix is ever written to memory. Accumulators are
// float32, as in a convolution of the whole map.

#include "elements.h"
#include "kernels.h"
#include "matrix.h"
#include "windows.h"

namespace spade_fast {
namespace {

constexpr int kChannels = 64;            // per step: 128 bytes of each row
constexpr int kVectors = kChannels / 8;  // of 16 bytes each
constexpr int kRowBytes = 16 * kVectors;

// The shape of a block's tile: windows and outputs, how they are divided between its warps, and the
// number of steps that its shared memory holds.
template <int kWindows_, int kOutputs_, int kWindowWarps_, int kOutputWarps_, int kSteps_>
struct Tile {
  static constexpr int kWindows = kWindows_, kOutputs = kOutputs_, kWindowWarps = kWindowWarps_,
                       kOutputWarps = kOutputWarps_;
  static constexpr int kSteps = kSteps_, kThreads = 32 * kWindowWarps * kOutputWarps;
  // In fragments of 16.
  static constexpr int kWarpWindows = kWindows / kWindowWarps / 16,
                       kWarpOutputs = kOutputs / kOutputWarps / 16;
  static constexpr int kStepBytes = (kWindows + kOutputs) * kRowBytes;
  static constexpr int kBegins = kWindows + 4;  // one for the end of the last list
  static int64_t shared(int taps) {
    return int64_t{kSteps} * kStepBytes + int64_t{4} * (kBegins + kWindows * taps);
  }
  static int64_t blocks(const WindowConvolution& w) {
    return divide_up(w.lists.count, kWindows) * divide_up(w.outputs, kOutputs);
  }
};

// The address of a vector of a step's row. Vectors are swizzled by row, so that the eight rows that
// ldmatrix reads at once lie in different banks.
__device__ inline char* place(char* step, int row, int vector) {
  return step + row * kRowBytes + (vector ^ row % 8) * 16;
}

// A step of the inner dimension: kChannels channels of one tap.
struct Step {
  int tap, channel;

  __device__ void advance(int width) {
    channel += kChannels;
    if (channel >= width) channel = 0, ++tap;
  }
};

// Finds the row that each window of a block sees through each tap, −1 beyond the border: an array
// [kWindows, taps] behind the begins of the windows' lists.
template <typename T>
__device__ void find_rows(const WindowConvolution& w, int64_t first_window, int32_t* begins) {
  int32_t* seen = begins + T::kBegins;
  const int all = T::kWindows * w.taps;
  for (int i = threadIdx.x; i <= T::kWindows; i += T::kThreads) {
    const int64_t window = first_window + i;
    begins[i] =
        static_cast<int32_t>(w.lists.begin(window < w.lists.count ? window : w.lists.count));
  }
  for (int i = threadIdx.x; i < all; i += T::kThreads) seen[i] = -1;
  __syncthreads();
#pragma unroll 4
  for (int i = threadIdx.x; i < all; i += T::kThreads) {
    const int window = i / w.taps, place = i % w.taps;
    const bool exists = place < begins[window + 1] - begins[window];
    const int32_t number = exists ? __ldg(w.lists.listed + begins[window] + place) : -1,
                  row = number / w.taps;
    if (number >= 0 && row < w.row_count) seen[window * w.taps + number % w.taps] = row;
  }
  __syncthreads();
}

// Starts the copies of one step's rows to shared memory.
template <typename T, Type kType>
__device__ void fetch_rows(const WindowConvolution& w, const Step& step, const int32_t* seen,
                           char* to) {
  const int vector = threadIdx.x % kVectors, channel = step.channel + vector * 8;
#pragma unroll
  for (int i = threadIdx.x / kVectors; i < T::kWindows; i += T::kThreads / kVectors) {
    const int32_t row = seen[i * w.taps + step.tap];
    const int left = row < 0 ? 0 : w.channels - channel;
    const char* from = w.rows.data + (left > 0 ? row * w.rows.row + channel : 0) * 2;
    if (w.vector) {
      copy_async_or_zeros(place(to, i, vector), from, left > 0);
    } else {
      load_async<8>(reinterpret_cast<Raw*>(place(to, i, vector)), from, kType,
                    {1,
                     left < 0   ? 0
                     : left < 8 ? left
                                : 8,
                     false});
    }
  }
}

// Starts the copies of one step's weights, which lie behind the rows.
template <typename T>
__device__ void fetch_weights(const WindowConvolution& w, const Step& step, int64_t first_output,
                              char* to) {
  const int vector = threadIdx.x % kVectors, channel = step.channel + vector * 8;
#pragma unroll
  for (int i = threadIdx.x / kVectors; i < T::kOutputs; i += T::kThreads / kVectors) {
    const int64_t output = first_output + i;
    const bool exists = output < w.outputs && channel < w.width;
    const int64_t from = exists ? output * w.output + step.tap * w.tap + channel : 0;
    copy_async_or_zeros(place(to + T::kWindows * kRowBytes, i, vector), w.weight + from * 2,
                        exists);
  }
}

// A warp's accumulators, in fragments of 16 windows and 8 outputs.
template <typename T>
struct Products {
  float sums[T::kWarpWindows][2 * T::kWarpOutputs][4] = {};
  // The warp's first window and output in the block's tile.
  int window = threadIdx.x / 32 / T::kOutputWarps * T::kWarpWindows * 16;
  int output = threadIdx.x / 32 % T::kOutputWarps * T::kWarpOutputs * 16;

  // Adds the products of 16 channels of a step.
  template <Type kType>
  __device__ void add(char* step, int part) {
    const int matrix = threadIdx.x % 32 / 8, row = threadIdx.x % 8;
    uint32_t rows[T::kWarpWindows][4], weights[T::kWarpOutputs][4];
#pragma unroll
    for (int i = 0; i < T::kWarpWindows; ++i) {
      load_matrices(rows[i],
                    place(step, window + i * 16 + matrix % 2 * 8 + row, 2 * part + matrix / 2));
    }
#pragma unroll
    for (int j = 0; j < T::kWarpOutputs; ++j) {
      load_matrices(weights[j],
                    place(step + T::kWindows * kRowBytes, output + j * 16 + matrix / 2 * 8 + row,
                          2 * part + matrix % 2));
    }
#pragma unroll
    for (int i = 0; i < T::kWarpWindows; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * T::kWarpOutputs; ++j) {
        multiply_add<kType>(sums[i][j], rows[i], weights[j / 2][j % 2 * 2],
                            weights[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  // Epilogue: adds the bias and stores the results.
  template <Type kType>
  __device__ void write(const WindowConvolution& w, int64_t first_window,
                        int64_t first_output) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 2 * T::kWarpOutputs; ++j) {
      const int64_t at = first_output + output + j * 8 + lane % 4 * 2;
      float bias[2] = {};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (w.bias == nullptr || at + k >= w.outputs) continue;
        float values[8];
        unpack<8>(load<8>(w.bias + (at + k) * w.bias_step * 2, kType, {1, 1, false}), kType,
                  values);
        bias[k] = values[0];
      }
#pragma unroll
      for (int i = 0; i < 2 * T::kWarpWindows; ++i) {
        const int64_t of = first_window + window + i * 8 + lane / 4;
        if (of >= w.lists.count) continue;
        float found[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float sum = sums[i / 2][j][i % 2 * 2 + k] + bias[k];
          found[k] = w.relu && sum < 0 ? 0 : sum;  // NaN stays
        }
        if (w.outputs % 2 == 0 && at < w.outputs) {
          *reinterpret_cast<uint32_t*>(w.results.at(0, of, at)) =
              to_16_bits(found[0], kType) | to_16_bits(found[1], kType) << 16;
        } else {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            if (at + k < w.outputs) store_one(w.results.at(0, of, at + k), found[k], kType);
          }
        }
      }
    }
  }
};

template <typename T, Type kType>
__global__ void __launch_bounds__(kThreads) convolve_windows_kernel(WindowConvolution w) {
  const int64_t output_blocks = (w.outputs + T::kOutputs - 1) / T::kOutputs;
  const int64_t first_window = blockIdx.x / output_blocks * T::kWindows,
                first_output = blockIdx.x % output_blocks * T::kOutputs;
  char* steps = shared_memory();
  int32_t *begins = reinterpret_cast<int32_t*>(steps + T::kSteps * T::kStepBytes),
          *seen = begins + T::kBegins;
  const int count = w.taps * ((w.width + kChannels - 1) / kChannels);
  const auto at = [&](int number) { return steps + number % T::kSteps * T::kStepBytes; };
  Step next = {};
  // Weights first: they do not depend on find_rows.
  for (int number = 0; number < T::kSteps - 1 && number < count; ++number) {
    fetch_weights<T>(w, next, first_output, at(number));
    next.advance(w.width);
  }
  find_rows<T>(w, first_window, begins);
  next = {};
  for (int number = 0; number < T::kSteps - 1; ++number) {
    if (number < count) fetch_rows<T, kType>(w, next, seen, at(number));
    end_group_of_copies();
    next.advance(w.width);
  }
  Products<T> products;
  Step step = {};
  for (int number = 0; number < count; ++number) {
    wait_for_copies_but<T::kSteps - 2>();
    // After the barrier all threads' copies of this step have arrived, and no thread reads the step
    // whose buffer the next copies overwrite.
    __syncthreads();
    if (const int later = number + T::kSteps - 1; later < count) {
      fetch_rows<T, kType>(w, next, seen, at(later));
      fetch_weights<T>(w, next, first_output, at(later));
      next.advance(w.width);
    }
    end_group_of_copies();
#pragma unroll
    for (int part = 0; part < kChannels / 16; ++part) {
      if (step.channel + part * 16 < w.width) products.template add<kType>(at(number), part);
    }
    step.advance(w.width);
  }
  products.template write<kType>(w, first_window, first_output);
}

template <typename T>
void convolve_in(Stream stream, const WindowConvolution& w) {
  const auto kernel = w.rows.type == Type::bfloat16 ? convolve_windows_kernel<T, Type::bfloat16>
                                                    : convolve_windows_kernel<T, Type::float16>;
  launch(kernel, T::blocks(w), dim3(T::kThreads), T::shared(w.taps), stream, w);
}

template <typename T>
bool suits(const WindowConvolution& w) {
  return T::blocks(w) >= processors() && T::shared(w.taps) <= most_shared_memory();
}

using Large = Tile<128, 128, 2, 4, 3>;
using Medium = Tile<64, 64, 2, 2, 4>;
using Small = Tile<32, 32, 2, 2, 6>;

}  // namespace

// Uses the largest tiles, which read the least, that still occupy all SMs.
void convolve_windows(Stream stream, const WindowConvolution& w) {
  suits<Large>(w)    ? convolve_in<Large>(stream, w)
  : suits<Medium>(w) ? convolve_in<Medium>(stream, w)
                     : convolve_in<Small>(stream, w);
}

}  // namespace spade_fast
