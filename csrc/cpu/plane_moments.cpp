// plane_moments on the CPU: mean and sum of squared deviations of every plane (n, c) of x [N, C, *spatial], as [2, N, C].
//
// x is read once. A few hundred elements of a plane at a time are measured in two passes, first the mean, then the deviations
// from it, while they are in the nearest cache; their moments are combined exactly (Chan et al., 1979) in double precision. So a
// large mean costs no accuracy, and the result does not depend on the number of threads.

#include "tensors.h"

namespace spade_fast {
namespace {

struct Moments {
  double count = 0, mean = 0, squares = 0;

  // From sums of deviations from a mean that was rounded, which their own sum corrects.
  static ALWAYS_INLINE Moments of(double count, double mean, double deviations, double squares) {
    const double correction = deviations / count;
    return {count, mean + correction, squares - correction * deviations};
  }

  ALWAYS_INLINE void combine(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, difference = other.mean - mean;
    mean += difference * (other.count / total);
    squares += other.squares + difference * difference * (count * other.count / total);
    count = total;
  }
};

// A run of pixels of one plane.
template <typename Sum>
struct MeasureRun {
  static ALWAYS_INLINE void run(int64_t count, const Sum* x, Moments* moments) {
    Sum sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += x[i];
    const Sum mean = sum / static_cast<Sum>(count);
    Sum deviations = 0, squares = 0;
#pragma omp simd reduction(+ : deviations, squares)
    for (int64_t i = 0; i < count; ++i) {
      const Sum deviation = x[i] - mean;
      deviations += deviation;
      squares += deviation * deviation;
    }
    moments->combine(Moments::of(count, mean, deviations, squares));
  }
};

// Some channels of some pixels, whose rows are given.
template <typename Sum>
struct MeasureChannels {
  static ALWAYS_INLINE void run(int64_t channels, int64_t pixels, const Sum* const* rows, Moments* moments) {
    Sum mean[kBlock], deviations[kBlock], squares[kBlock];
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) mean[c] = deviations[c] = squares[c] = 0;
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const Sum* row = rows[pixel];
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) mean[c] += row[c];
    }
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<Sum>(pixels);
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const Sum* row = rows[pixel];
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const Sum deviation = row[c] - mean[c];
        deviations[c] += deviation;
        squares[c] += deviation * deviation;
      }
    }
    for (int64_t c = 0; c < channels; ++c) moments[c].combine(Moments::of(pixels, mean[c], deviations[c], squares[c]));
  }
};

constexpr int64_t kPixels = 64;  // pixels whose channels are measured at a time

template <typename Sum>
void measure_all(const Tasks& tasks, const Source<Sum>& x, Moments* found) {
  tasks.for_each([&](int64_t task) {
    if (tasks.layout == Layout::contiguous) {
      Sum buffer[kBlock];
      tasks.for_each_block(task, [&](int64_t n, int64_t row, int64_t start, int64_t count, int64_t) {
        vectorised<MeasureRun<Sum>>(count, x.read(n, row, start, count, buffer), found + task);
      });
      return;
    }
    std::vector<Sum> buffer(kPixels * kBlock);
    const Sum* rows[kPixels];
    const int64_t n = task / tasks.parts, first = task % tasks.parts * tasks.step, last = std::min(first + tasks.step, tasks.pixels);
    for (int64_t c = 0; c < tasks.channels; c += kBlock) {
      const int64_t channels = std::min(kBlock, tasks.channels - c);
      for (int64_t start = first; start < last; start += kPixels) {
        const int64_t pixels = std::min(kPixels, last - start);
        for (int64_t i = 0; i < pixels; ++i) rows[i] = x.read(n, start + i, c, channels, buffer.data() + i * kBlock);
        vectorised<MeasureChannels<Sum>>(channels, pixels, rows, found + task * tasks.channels + c);
      }
    }
  });
}

Tensor plane_moments(const Tensor& x) {
  const Layout layout = layout_of(x);
  const Tasks tasks(x, layout);
  const int64_t planes = tasks.batch * tasks.channels;
  std::vector<Moments> found(planes * tasks.parts);
  const Tensor moments = torch::stable::new_empty(x, {2, tasks.batch, tasks.channels}, sum_dtype(x.scalar_type()));
  dispatch_sum(x.scalar_type(), [&](auto zero) {
    using Sum = decltype(zero);
    measure_all<Sum>(tasks, Source<Sum>(x, layout), found.data());
    Sum* mean = moments.mutable_data_ptr<Sum>();
    for (int64_t plane = 0; plane < planes; ++plane) {
      const int64_t n = plane / tasks.channels, c = plane % tasks.channels;
      Moments total;
      for (int64_t part = 0; part < tasks.parts; ++part) {
        total.combine(layout == Layout::contiguous ? found[plane * tasks.parts + part]
                                                   : found[(n * tasks.parts + part) * tasks.channels + c]);
      }
      mean[plane] = static_cast<Sum>(total.mean);
      mean[planes + plane] = static_cast<Sum>(total.squares);
    }
  });
  return moments;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, library) {
  library.impl("plane_moments", TORCH_BOX(&plane_moments));
}

}  // namespace spade_fast
