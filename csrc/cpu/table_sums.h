// backward_sums with γ and β in a table: the gradients of its rows, and the sums of every plane,
// which follow from those at no cost.
//
// `order` lists each image's pixels sorted by window, so that the gradient of a row is a sum over
// consecutive entries of that list. There are no atomics, and the result does not depend on the
// number of threads. With Σg and D = Σ g·(x − shift) over the pixels of one window in one image,
//
//     dβ = Σg,  dγ = scale·D + offset·Σg               summed over images
//     Σq = (1 + γ)·Σg,  Σq·(x − shift) = (1 + γ)·D     summed over windows
//
// Images are processed one after the other, because they may share windows.
#pragma once

#include "gradient.h"

namespace spade_fast {

// Adds the channels of one pixel to the sums of its window.
template <typename Sum>
struct AddGradient {
  static ALWAYS_INLINE void run(int64_t count, BackwardBlock<Sum> block, PerChannel<Sum> shift,
                                PerChannel<Sum> scale, PerChannel<Sum> offset,
                                Activation activation, Sum negative_slope, Sum* g_sums,
                                Sum* g_deviation_sums) {
    Sum g[kBlock], deviation[kBlock];
    gradient(count, block, static_cast<const Sum*>(block.gamma.data), shift, scale, offset,
             activation, negative_slope, g, deviation);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      g_sums[i] += g[i];
      g_deviation_sums[i] += g[i] * deviation[i];
    }
  }
};

// Adds the sums of a window to the gradients of its row and to the sums of the planes.
template <typename Sum>
struct FinishWindow {
  static ALWAYS_INLINE void run(int64_t count, const Sum* g_sums, const Sum* g_deviation_sums,
                                Elements<Sum> gamma_elements, PerChannel<Sum> scale,
                                PerChannel<Sum> offset, Sum* dgamma, Sum* dbeta, Sum* q_sums,
                                Sum* q_deviation_sums) {
    Sum buffer[kBlock];
    const Sum* gamma = gamma_elements.read(count, buffer);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      dgamma[i] += g_deviation_sums[i] * scale[i] + g_sums[i] * offset[i];
      dbeta[i] += g_sums[i];
      q_sums[i] += g_sums[i] * (1 + gamma[i]);
      q_deviation_sums[i] += g_deviation_sums[i] * (1 + gamma[i]);
    }
  }
};

// Stores g and g·(x − shift) of a block of a plane.
template <typename Sum>
struct KeepGradient {
  static ALWAYS_INLINE void run(int64_t count, BackwardBlock<Sum> block, Uniform<Sum> shift,
                                Uniform<Sum> scale, Uniform<Sum> offset, Activation activation,
                                Sum negative_slope, Sum* g, Sum* g_deviation) {
    Sum buffer[kBlock], deviation[kBlock];
    const Sum* gamma = activation == Activation::silu ? block.gamma.read(count, buffer) : nullptr;
    gradient(count, block, gamma, shift, scale, offset, activation, negative_slope, g, deviation);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) g_deviation[i] = g[i] * deviation[i];
  }
};

// The pixels of all images sorted by window, and the window of each: both [N, S]. Refuses an
// `order` that is not that.
struct SortedPixels {
  Tensor owner;
  const int32_t* order;
  std::vector<int32_t> windows;

  SortedPixels(const Tensor& index, const Tensor& given_order, int64_t pixels)
      : owner(without_gaps(given_order)),
        order(owner.const_data_ptr<int32_t>()),
        windows(index.numel()) {
    check_range(given_order, "order", pixels);
    const Tensor index_owner = without_gaps(index);
    const int32_t* window = index_owner.const_data_ptr<int32_t>();
    for (int64_t start = 0; start < index.numel(); start += pixels) {
      // Every sort in this package also sorts the pixels within a window. If so, the keys increase
      // strictly and no pixel occurs twice.
      bool sorted = true;
      int64_t before = -1;
      for (int64_t i = start; i < start + pixels; ++i) {
        windows[i] = window[start + order[i]];
        const int64_t key = static_cast<int64_t>(windows[i]) << 32 | order[i];
        sorted = sorted && key > before, before = key;
      }
      STD_TORCH_CHECK(
          sorted || lists_sorted_pixels(start, pixels),
          "spade_fast: order is not sorted by index; it should list every pixel of each "
          "image once, sorted by index");
    }
  }

  // The slower check, which accepts the pixels of a window in any order.
  bool lists_sorted_pixels(int64_t start, int64_t pixels) const {
    std::vector<bool> seen(pixels);
    for (int64_t i = start; i < start + pixels; ++i) {
      if (seen[order[i]] || (i > start && windows[i] < windows[i - 1])) return false;
      seen[order[i]] = true;
    }
    return true;
  }
};

// Channels last. dgamma and dbeta are [K, C], found is [tasks, 2, C]; all start as zeros.
template <typename Sum>
void sum_table_by_pixels(const Tasks& tasks, const Operands<Sum>& m, const Source<Sum>& dy,
                         const SortedPixels& sorted, Sum* dgamma, Sum* dbeta, Sum* found) {
  const int64_t channels = tasks.channels;
  // A task's first and last window may continue in the neighbouring tasks. Their gradients go to
  // rows of the task's own, which are added at the end.
  struct Border {
    int64_t window = -1;
    std::vector<Sum> dgamma, dbeta;
  };
  for (int64_t n = 0; n < tasks.batch; ++n) {
    std::vector<Border> borders(2 * tasks.parts);
    const int32_t* order = sorted.order + n * tasks.pixels;
    const int32_t* windows = sorted.windows.data() + n * tasks.pixels;
    tasks.for_each(n * tasks.parts, (n + 1) * tasks.parts, [&](int64_t task) {
      Sum* sums = found + 2 * channels * task;
      const int64_t part = task % tasks.parts, first = part * tasks.step,
                    last = std::min(first + tasks.step, tasks.pixels);
      for (int64_t begin = first, end; begin < last; begin = end) {
        const int64_t window = windows[begin];
        for (end = begin + 1; end < last && windows[end] == window;) ++end;
        Sum *row_dgamma = dgamma + window * channels, *row_dbeta = dbeta + window * channels;
        if (begin == first || end == last) {
          Border& border = borders[2 * part + (begin != first)];
          border = {window, std::vector<Sum>(channels), std::vector<Sum>(channels)};
          row_dgamma = border.dgamma.data(), row_dbeta = border.dbeta.data();
        }
        for (int64_t c = 0; c < channels; c += kBlock) {
          const int64_t count = std::min(kBlock, channels - c), number = n * channels + c;
          const auto shift = m.planes.per_channel(0, number),
                     scale = m.planes.per_channel(1, number),
                     offset = m.planes.per_channel(2, number);
          Sum g_sums[kBlock] = {}, g_deviation_sums[kBlock] = {};
          for (int64_t i = begin; i < end; ++i) {
            vectorised<AddGradient<Sum>>(count, backward_block(m, dy, n, order[i], c), shift, scale,
                                         offset, m.activation, m.negative_slope, g_sums,
                                         g_deviation_sums);
          }
          vectorised<FinishWindow<Sum>>(
              count, g_sums, g_deviation_sums, m.gamma.at(n, order[begin], c), scale, offset,
              row_dgamma + c, row_dbeta + c, sums + c, sums + channels + c);
        }
      }
    });
    for (const Border& border : borders) {
      for (int64_t c = 0; border.window >= 0 && c < channels; ++c) {
        dgamma[border.window * channels + c] += border.dgamma[c];
        dbeta[border.window * channels + c] += border.dbeta[c];
      }
    }
  }
}

// Contiguous planes. dgamma and dbeta are [C, K] and start as zeros; sums is [2, N, C].
template <typename Sum>
void sum_table_by_planes(const Tasks& tasks, const Operands<Sum>& m, const Source<Sum>& dy,
                         const SortedPixels& sorted, int64_t rows, Sum* dgamma, Sum* dbeta,
                         Sum* sums) {
  const int64_t pixels = tasks.pixels, planes = tasks.batch * tasks.channels;
  torch::stable::parallel_for(0, tasks.channels, 1, [&](int64_t first, int64_t last) {
    std::vector<Sum> g(pixels), g_deviation(pixels);
    for (int64_t c = first; c < last; ++c) {
      const Sum* gamma = m.gamma.plane_of_table(c);
      for (int64_t n = 0; n < tasks.batch; ++n) {
        const int64_t number = n * tasks.channels + c;
        const auto shift = m.planes.uniform(0, number), scale = m.planes.uniform(1, number),
                   offset = m.planes.uniform(2, number);
        for (int64_t start = 0; start < pixels; start += kBlock) {
          const int64_t count = std::min(kBlock, pixels - start);
          vectorised<KeepGradient<Sum>>(count, backward_block(m, dy, n, c, start), shift, scale,
                                        offset, m.activation, m.negative_slope, g.data() + start,
                                        g_deviation.data() + start);
        }
        double q_sum = 0, q_deviation_sum = 0;
        const int32_t* order = sorted.order + n * pixels;
        const int32_t* windows = sorted.windows.data() + n * pixels;
        for (int64_t i = 0; i < pixels;) {
          const int64_t window = windows[i];
          double g_sum = 0, g_deviation_sum = 0;
          for (; i < pixels && windows[i] == window; ++i) {
            g_sum += g[order[i]];
            g_deviation_sum += g_deviation[order[i]];
          }
          dgamma[c * rows + window] +=
              static_cast<Sum>(g_deviation_sum * scale.value + g_sum * offset.value);
          dbeta[c * rows + window] += static_cast<Sum>(g_sum);
          q_sum += g_sum * (1.0 + gamma[window]);
          q_deviation_sum += g_deviation_sum * (1.0 + gamma[window]);
        }
        sums[number] = static_cast<Sum>(q_sum);
        sums[planes + number] = static_cast<Sum>(q_deviation_sum);
      }
    }
  });
}

}  // namespace spade_fast
