// backward_sums with γ and β in a table: the gradients of its rows, and the sums of every plane,
// which follow from those at no cost.
//
// `order` lists each image's pixels sorted by window, so that the gradient of a row is a sum over
// runs of that list. A task sums its own part of the list: with channels last a section of it;
// with contiguous planes the entries of its pixels, still sorted, band by band of kBlock pixels.
// There are no atomics, and the result does not depend on the number of threads. With Σg and
// D = Σ g·(x − shift) over the pixels of one run, and its row's factor f = addend + γ,
//
//     dβ = Σg,  dγ = scale·D + offset·Σg               summed over the runs of a window
//     Σq = f·Σg,  Σq·(x − shift) = f·D                 summed over the runs of an image
//
// A window that one part alone has is summed in its own row. If several have it, each has another
// row for it, and these are added in the order of the parts.
#pragma once

#include "gradient.h"

namespace spade_fast {

// Adds the channels of one pixel to the sums of its run.
template <typename Sum>
struct AddGradient {
  static ALWAYS_INLINE void run(int64_t count, BackwardBlock<Sum> block, PerChannel<Sum> shift,
                                PerChannel<Sum> scale, PerChannel<Sum> offset,
                                Activation activation, Sum negative_slope, Sum addend, Sum* g_sums,
                                Sum* g_deviation_sums) {
    Sum g[kBlock], deviation[kBlock];
    gradient(count, block, static_cast<const Sum*>(block.gamma.data), shift, scale, offset,
             activation, negative_slope, addend, g, deviation);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      g_sums[i] += g[i];
      g_deviation_sums[i] += g[i] * deviation[i];
    }
  }
};

// Adds the sums of a run to the gradients of its row and to the sums of the planes.
template <typename Sum>
struct FinishRun {
  static ALWAYS_INLINE void run(int64_t count, const Sum* g_sums, const Sum* g_deviation_sums,
                                const Sum* gamma, Sum addend, PerChannel<Sum> scale,
                                PerChannel<Sum> offset, Sum* dgamma, Sum* dbeta, Sum* q_sums,
                                Sum* q_deviation_sums) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      dgamma[i] += g_deviation_sums[i] * scale[i] + g_sums[i] * offset[i];
      dbeta[i] += g_sums[i];
      q_sums[i] += g_sums[i] * (addend + gamma[i]);
      q_deviation_sums[i] += g_deviation_sums[i] * (addend + gamma[i]);
    }
  }
};

// Stores g and g·(x − shift) of a block of a plane.
template <typename Sum>
struct KeepGradient {
  static ALWAYS_INLINE void run(int64_t count, BackwardBlock<Sum> block, Uniform<Sum> shift,
                                Uniform<Sum> scale, Uniform<Sum> offset, Activation activation,
                                Sum negative_slope, Sum addend, Sum* g, Sum* g_deviation) {
    Sum buffer[kBlock], deviation[kBlock];
    const Sum* gamma = activation == Activation::silu ? block.gamma.read(count, buffer) : nullptr;
    gradient(count, block, gamma, shift, scale, offset, activation, negative_slope, addend, g,
             deviation);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) g_deviation[i] = g[i] * deviation[i];
  }
};

// The list of pixels, and for each entry the row in which its gradient is summed. Refuses an
// `order` that is not every image's pixels sorted by window.
struct SortedPixels {
  Tensor owner;
  const int32_t* order;
  std::vector<int32_t> bands;   // contiguous: the list, whose bands are sorted
  std::vector<int32_t> rows;    // a window, or ~i if the gradient is summed in extra row i
  std::vector<int32_t> extras;  // the windows of the extra rows

  SortedPixels(const Tensor& index, const Tensor& given_order, const Tasks& tasks, int64_t windows)
      : owner(without_gaps(given_order)),
        order(owner.const_data_ptr<int32_t>()),
        rows(index.numel()) {
    check_range(given_order, "order", tasks.pixels);
    const Tensor index_owner = without_gaps(index);
    const int32_t* window = index_owner.const_data_ptr<int32_t>();
    for (int64_t start = 0; start < index.numel(); start += tasks.pixels) {
      // Every sort in this package also sorts the pixels within a window. If so, the keys increase
      // strictly and no pixel occurs twice.
      bool sorted = true;
      int64_t before = -1;
      for (int64_t i = start; i < start + tasks.pixels; ++i) {
        rows[i] = window[start + order[i]];
        const int64_t key = static_cast<int64_t>(rows[i]) << 32 | order[i];
        sorted = sorted && key > before, before = key;
      }
      STD_TORCH_CHECK(
          sorted || lists_sorted_pixels(start, tasks.pixels),
          "spade_fast: order is not sorted by index; it should list every pixel of each "
          "image once, sorted by index");
    }
    if (tasks.layout == Layout::contiguous) sort_bands(tasks);
    add_extras(tasks, windows);
  }

 private:
  // The slower check, which accepts the pixels of a window in any order.
  bool lists_sorted_pixels(int64_t start, int64_t pixels) const {
    std::vector<bool> seen(pixels);
    for (int64_t i = start; i < start + pixels; ++i) {
      if (seen[order[i]] || (i > start && rows[i] < rows[i - 1])) return false;
      seen[order[i]] = true;
    }
    return true;
  }

  void sort_bands(const Tasks& tasks) {
    bands.resize(rows.size());
    std::vector<int32_t> sorted(rows.size());
    for (int64_t start = 0; start < static_cast<int64_t>(rows.size()); start += tasks.pixels) {
      std::vector<int64_t> next((tasks.pixels + kBlock - 1) / kBlock);
      for (size_t band = 0; band < next.size(); ++band) next[band] = start + band * kBlock;
      for (int64_t i = start; i < start + tasks.pixels; ++i) {
        const int64_t place = next[order[i] / kBlock]++;
        bands[place] = order[i], sorted[place] = rows[i];
      }
    }
    rows.swap(sorted);
    order = bands.data();
  }

  void add_extras(const Tasks& tasks, int64_t windows) {
    constexpr int32_t kNone = -1;
    struct Found {
      int32_t part = kNone, row = 0;
      bool shared = false;
    };
    std::vector<Found> found(windows);
    // Calls f(the window's Found, the run's first entry, its end, part) for every run of a part.
    const auto for_each_run = [&](const auto& f) {
      int32_t part = 0;
      for (int64_t start = 0; start < static_cast<int64_t>(rows.size()); start += tasks.pixels) {
        for (int64_t first = 0; first < tasks.pixels; first += tasks.step, ++part) {
          const int64_t last = start + std::min(first + tasks.step, tasks.pixels);
          for (int64_t begin = start + first, end; begin < last; begin = end) {
            for (end = begin + 1; end < last && rows[end] == rows[begin];) ++end;
            f(found[rows[begin]], begin, end, part);
          }
        }
      }
    };
    for_each_run([](Found& one, int64_t, int64_t, int32_t part) {
      one.shared = one.shared || (one.part != kNone && one.part != part);
      one.part = part;
    });
    for (Found& one : found) one.part = kNone;
    for_each_run([&](Found& one, int64_t begin, int64_t end, int32_t part) {
      if (!one.shared) return;
      if (one.part != part) {
        one = {part, ~static_cast<int32_t>(extras.size()), true};
        extras.push_back(rows[begin]);
      }
      std::fill(rows.begin() + begin, rows.begin() + end, one.row);
    });
  }
};

// The rows of dγ and dβ, [K, C], and those of `extras`, [2, C] each, from channel `first` on.
template <typename Sum>
struct GradientRows {
  int64_t channels;
  Sum *dgamma, *dbeta, *extras;
  int64_t first;

  ALWAYS_INLINE Sum* dgamma_of(int32_t row) const {
    return (row >= 0 ? dgamma + row * channels : extras + 2 * int64_t{~row} * channels) + first;
  }
  ALWAYS_INLINE Sum* dbeta_of(int32_t row) const {
    return (row >= 0 ? dbeta + row * channels : extras + (2 * int64_t{~row} + 1) * channels) +
           first;
  }
};

// Adds the runs of one band of kUnit planes to the gradients and to the sums of the planes, from g
// and g·(x − shift) of the band's pixels, as a tile each.
template <typename Sum, int kBytes>
struct SumBand : Vectors<Sum, kBytes> {
  using typename Vectors<Sum, kBytes>::Vector;
  using Vectors<Sum, kBytes>::at, Vectors<Sum, kBytes>::kOfUnit;

  static ALWAYS_INLINE void run(int64_t start, int64_t pixels, int64_t channels,
                                const int32_t* order, const int32_t* rows, Sum* g, Sum* g_deviation,
                                Table<Sum> gamma, Sum addend, PerChannel<Sum> scale,
                                PerChannel<Sum> offset, GradientRows<Sum> gradients, Sum* q_sums,
                                Sum* q_deviation_sums) {
    transpose(pixels, g), transpose(pixels, g_deviation);
    Sum band_sums[2][kUnit<Sum>] = {};
    for (int64_t i = 0; i < pixels;) {
      const int32_t row = rows[i], pixel = order[i];
      Vector sums[2][kOfUnit] = {};
      for (; i < pixels && rows[i] == row; ++i) {
        const int64_t place = order[i] - start, column = place & -kUnit<Sum>,
                      from = (place - column) * kTileRow<Sum> + column;
#pragma GCC unroll 4
        for (int v = 0; v < kOfUnit; ++v)
          sums[0][v] += at(g + from, v), sums[1][v] += at(g_deviation + from, v);
      }
      Sum run_sums[2][kUnit<Sum>];
      for (int v = 0; v < kOfUnit; ++v)
        at(run_sums[0], v) = sums[0][v], at(run_sums[1], v) = sums[1][v];
      FinishRun<Sum>::run(channels, run_sums[0], run_sums[1], gamma.at(pixel), addend, scale,
                          offset, gradients.dgamma_of(row), gradients.dbeta_of(row), band_sums[0],
                          band_sums[1]);
    }
    for (int64_t c = 0; c < channels; ++c)
      q_sums[c] += band_sums[0][c], q_deviation_sums[c] += band_sums[1][c];
  }

 private:
  // Transposes each square of a tile in its place.
  static ALWAYS_INLINE void transpose(int64_t pixels, Sum* tile) {
    for (int64_t p = 0; p < pixels; p += kUnit<Sum>) {
      Sum square[kUnit<Sum> * kUnit<Sum>];
      const Sum* planes[kUnit<Sum>];
      for (int64_t c = 0; c < kUnit<Sum>; ++c) {
        planes[c] = square + c * kUnit<Sum>;
#pragma GCC unroll 4
        for (int v = 0; v < kOfUnit; ++v)
          at(square + c * kUnit<Sum>, v) = at(tile + c * kTileRow<Sum> + p, v);
      }
      Transpose<Sum, kBytes>::run(planes, tile + p, kTileRow<Sum>);
    }
  }
};

template <typename Sum>
void sum_pixels(const Tasks& tasks, int64_t task, const Operands<Sum>& m, const Source<Sum>& dy,
                const SortedPixels& sorted, const GradientRows<Sum>& gradients, Sum* found) {
  const int64_t channels = tasks.channels, n = task / tasks.parts,
                last = n * tasks.pixels + tasks.last_pixel(task);
  BackwardReader<Sum> reader(m, dy, true);
  for (int64_t begin = n * tasks.pixels + tasks.first_pixel(task), end; begin < last; begin = end) {
    const int32_t row = sorted.rows[begin];
    for (end = begin + 1; end < last && sorted.rows[end] == row;) ++end;
    for (int64_t c = 0; c < channels; c += kBlock) {
      const int64_t count = std::min(kBlock, channels - c), number = n * channels + c;
      const auto shift = m.planes.per_channel(0, number), scale = m.planes.per_channel(1, number),
                 offset = m.planes.per_channel(2, number);
      Sum g_sums[kBlock] = {}, g_deviation_sums[kBlock] = {};
      for (int64_t i = begin; i < end; ++i) {
        vectorised<AddGradient<Sum>>(count, reader.at(n, sorted.order[i], c), shift, scale, offset,
                                     m.activation, m.negative_slope, m.addend,
                                     static_cast<Sum*>(g_sums),
                                     static_cast<Sum*>(g_deviation_sums));
      }
      vectorised<FinishRun<Sum>>(count, static_cast<const Sum*>(g_sums),
                                 static_cast<const Sum*>(g_deviation_sums),
                                 m.gamma.rows(n, c).at(sorted.order[begin]), m.addend, scale,
                                 offset, gradients.dgamma_of(row) + c, gradients.dbeta_of(row) + c,
                                 found + c, found + channels + c);
    }
  }
}

template <typename Sum>
void sum_planes(const Tasks& tasks, int64_t task, const Operands<Sum>& m, const Source<Sum>& dy,
                const SortedPixels& sorted, const GradientRows<Sum>& gradients, Sum* found) {
  constexpr int64_t kSize = kUnit<Sum> * kTileRow<Sum>;
  const int64_t unit = task / tasks.parts, n = tasks.image(unit);
  BackwardReader<Sum> reader(m, dy, false);
  const std::unique_ptr<Sum[]> tiles(new Sum[2 * kSize]);
  for (int64_t i = 0; i < tasks.planes_of(unit); i += kUnit<Sum>) {
    const int64_t channel = tasks.channel(unit) + i, number = tasks.first_plane(unit) + i,
                  channels = std::min(kUnit<Sum>, tasks.planes_of(unit) - i);
    GradientRows<Sum> rows = gradients;
    rows.first = channel;
    for (Sum* tile : {tiles.get(), tiles.get() + kSize})
      std::fill(tile + channels * kTileRow<Sum>, tile + kSize, Sum(0));
    tasks.for_each_tile(task, [&](int64_t first, int64_t last) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t start = first; start < last; start += kBlock) {
          Sum* g = tiles.get() + c * kTileRow<Sum> + start - first;
          vectorised<KeepGradient<Sum>>(
              std::min(kBlock, last - start), reader.at(n, channel + c, start),
              m.planes.uniform(0, number + c), m.planes.uniform(1, number + c),
              m.planes.uniform(2, number + c), m.activation, m.negative_slope, m.addend, g,
              g + kSize);
        }
      }
      for (int64_t start = first; start < last; start += kBlock) {
        const int64_t place = n * tasks.pixels + start;
        Sum* g = tiles.get() + start - first;
        in_vectors<SumBand, Sum>(start, std::min(kBlock, last - start), channels,
                                 sorted.order + place, sorted.rows.data() + place, g, g + kSize,
                                 m.gamma.rows(n, channel), m.addend,
                                 m.planes.per_channel(1, number), m.planes.per_channel(2, number),
                                 rows, found + i, found + tasks.width + i);
      }
    });
  }
}

// Adds to dgamma and dbeta [K, C] and to found [tasks, 2, width]; all start as zeros.
template <typename Sum>
void sum_table(const Tasks& tasks, const Operands<Sum>& m, const Source<Sum>& dy,
               const SortedPixels& sorted, Sum* dgamma, Sum* dbeta, Sum* found) {
  const int64_t channels = tasks.channels;
  std::vector<Sum> extras(2 * channels * sorted.extras.size());
  const GradientRows<Sum> gradients = {channels, dgamma, dbeta, extras.data(), 0};
  const auto sum_task = tasks.layout == Layout::contiguous ? sum_planes<Sum> : sum_pixels<Sum>;
  tasks.for_each([&](int64_t task) {
    sum_task(tasks, task, m, dy, sorted, gradients, found + 2 * tasks.width * task);
  });
  const int64_t count = sorted.extras.size(), grain = Tasks::kTask / (2 * count + 1) + 1;
  torch::stable::parallel_for(0, channels, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t window = sorted.extras[i];
      const Sum* extra = extras.data() + 2 * i * channels;
      for (int64_t c = first; c < last; ++c) dgamma[window * channels + c] += extra[c];
      for (int64_t c = first; c < last; ++c) dbeta[window * channels + c] += extra[channels + c];
    }
  });
}

}  // namespace spade_fast
