// plane_moments on the CPU: mean and sum of squared deviations of every plane (n, c) of x [N, C, *spatial], as [2, N, C].
//
// x is read once. A few hundred elements at a time are measured in two passes, first the mean, then the deviations from it, while
// they are in the nearest cache, and their moments are combined exactly (Chan et al., 1979) in double precision. So a large mean
// costs no accuracy, and the result does not depend on the number of threads.

#include <memory>

#include "tensors.h"

namespace spade_fast {
namespace {

// Adds a part's mean and squared deviations to those of what came before it. All planes side by side have the same counts, so that
// what must be divided is the same for all.
struct Combine {
  static ALWAYS_INLINE void run(int64_t planes, double count_before, double count, const double* part_mean,
                                const double* part_squares, double* mean, double* squares) {
    const double share = count / (count_before + count), weight = count_before * share;
#pragma omp simd
    for (int64_t i = 0; i < planes; ++i) {
      const double difference = part_mean[i] - mean[i];
      mean[i] += difference * share;
      squares[i] += part_squares[i] + difference * difference * weight;
    }
  }
};

// A run of pixels of one plane.
template <typename Sum>
struct MeasureRun {
  static ALWAYS_INLINE void run(int64_t count, const Sum* x, double count_before, double* mean, double* squares) {
    Sum sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += x[i];
    const Sum rounded_mean = sum / static_cast<Sum>(count);
    Sum deviation_sum = 0, square_sum = 0;
#pragma omp simd reduction(+ : deviation_sum, square_sum)
    for (int64_t i = 0; i < count; ++i) {
      const Sum deviation = x[i] - rounded_mean;
      deviation_sum += deviation;
      square_sum += deviation * deviation;
    }
    const double correction = static_cast<double>(deviation_sum) / count;  // of the mean's rounding
    const double run_mean = rounded_mean + correction, run_squares = square_sum - correction * deviation_sum;
    Combine::run(1, count_before, count, &run_mean, &run_squares, mean, squares);
  }
};

// A pixel's channels, added to the sums of its band; then, with the means, its deviations and their squares. One pixel at a time,
// since the compiler does not vectorise over channels inside a loop over pixels.
template <typename Sum>
struct AddPixel {
  static ALWAYS_INLINE void run(int64_t channels, const Sum* x, Sum* sums) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) sums[c] += x[c];
  }
};

template <typename Sum>
struct AddDeviations {
  static ALWAYS_INLINE void run(int64_t channels, const Sum* x, const Sum* mean, Sum* deviation_sums, Sum* square_sums) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const Sum deviation = x[c] - mean[c];
      deviation_sums[c] += deviation;
      square_sums[c] += deviation * deviation;
    }
  }
};

// The moments of some pixels, from what was added up of them, combined with those of the pixels before.
template <typename Sum>
struct FinishPixels {
  static ALWAYS_INLINE void run(int64_t channels, double count, const Sum* rounded_mean, const Sum* deviation_sums,
                                const Sum* square_sums, double count_before, double* mean, double* squares) {
    double part_mean[kBlock], part_squares[kBlock];
    const double share = 1 / count;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const double correction = deviation_sums[c] * share;
      part_mean[c] = rounded_mean[c] + correction;
      part_squares[c] = square_sums[c] - correction * deviation_sums[c];
    }
    Combine::run(channels, count_before, count, part_mean, part_squares, mean, squares);
  }
};

// Some channels of some pixels, whose rows are given.
template <typename Sum>
void measure_pixels(int64_t channels, int64_t pixels, const Sum* const* rows, double count_before, double* mean, double* squares) {
  Sum rounded_mean[kBlock], deviation_sums[kBlock], square_sums[kBlock];
  for (Sum* sums : {rounded_mean, deviation_sums, square_sums}) std::fill_n(sums, channels, Sum(0));
  for (int64_t i = 0; i < pixels; ++i) vectorised<AddPixel<Sum>>(channels, rows[i], rounded_mean);
  for (int64_t c = 0; c < channels; ++c) rounded_mean[c] /= static_cast<Sum>(pixels);
  for (int64_t i = 0; i < pixels; ++i) vectorised<AddDeviations<Sum>>(channels, rows[i], rounded_mean, deviation_sums, square_sums);
  vectorised<FinishPixels<Sum>>(channels, static_cast<double>(pixels), rounded_mean, deviation_sums, square_sums, count_before, mean,
                                squares);
}

constexpr int64_t kPixels = 64;  // pixels whose channels are measured at a time

// Each task's moments: found[task] is [2, width], mean and squares, of a part of a plane (width 1) or of an image's band (width C).
template <typename Sum>
void measure_all(const Tasks& tasks, const Source<Sum>& x, int64_t width, double* found) {
  tasks.for_each([&](int64_t task) {
    double* mean = found + 2 * width * task;
    double* squares = mean + width;
    if (tasks.layout == Layout::contiguous) {
      Sum buffer[kBlock];
      int64_t done = 0;
      tasks.for_each_block(task, [&](int64_t n, int64_t row, int64_t start, int64_t count, int64_t) {
        vectorised<MeasureRun<Sum>>(count, x.read(n, row, start, count, buffer), static_cast<double>(done), mean, squares);
        done += count;
      });
      return;
    }
    const std::unique_ptr<Sum[]> buffer(new Sum[kPixels * kBlock]);  // not filled with zeros, as a vector would be
    const Sum* rows[kPixels];
    const int64_t n = task / tasks.parts, first = task % tasks.parts * tasks.step, last = std::min(first + tasks.step, tasks.pixels);
    for (int64_t c = 0; c < tasks.channels; c += kBlock) {
      const int64_t channels = std::min(kBlock, tasks.channels - c);
      for (int64_t start = first; start < last; start += kPixels) {
        const int64_t pixels = std::min(kPixels, last - start);
        for (int64_t i = 0; i < pixels; ++i) rows[i] = x.read(n, start + i, c, channels, buffer.get() + i * kBlock);
        measure_pixels(channels, pixels, rows, static_cast<double>(start - first), mean + c, squares + c);
      }
    }
  });
}

Tensor plane_moments(const Tensor& x) {
  const Layout layout = layout_of(x);
  const Tasks tasks(x, layout);
  const int64_t width = layout == Layout::contiguous ? 1 : tasks.channels;
  const int64_t images_or_planes = tasks.batch * tasks.channels / std::max<int64_t>(1, width);
  std::vector<double> found(2 * width * tasks.count());
  std::vector<double> total(2 * width);
  const Tensor moments = torch::stable::new_empty(x, {2, tasks.batch, tasks.channels}, sum_dtype(x.scalar_type()));
  dispatch_sum(x.scalar_type(), [&](auto zero) {
    using Sum = decltype(zero);
    measure_all<Sum>(tasks, Source<Sum>(x, layout), width, found.data());
    Sum* mean = moments.mutable_data_ptr<Sum>();
    Sum* squares = mean + tasks.batch * tasks.channels;
    for (int64_t i = 0; i < images_or_planes; ++i) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t part = 0; part < tasks.parts; ++part) {
        const double before = part * tasks.step, count = std::min(tasks.step, tasks.pixels - part * tasks.step);
        const double* part_mean = &found[2 * width * (i * tasks.parts + part)];
        vectorised<Combine>(width, before, count, part_mean, part_mean + width, total.data(), total.data() + width);
      }
      std::copy_n(total.begin(), width, mean + i * width);
      std::copy_n(total.begin() + width, width, squares + i * width);
    }
  });
  return moments;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, library) {
  library.impl("plane_moments", TORCH_BOX(&plane_moments));
}

}  // namespace spade_fast
