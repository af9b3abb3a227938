// plane_moments on the CPU: mean and sum of squared deviations of every plane (n, c) of x
// [N, C, *spatial], as [2, N, C].
//
// x is read from memory once. Each run of a few hundred elements is measured in two passes while it
// is in the L1 cache: first the mean, then the deviations from it. The moments of the runs are
// combined exactly (Chan et al., 1979) in double precision. So a large mean costs no accuracy, and
// the result does not depend on the number of threads.

#include <memory>

#include "kernels.h"

namespace spade_fast {
namespace {

// Combines the moments of a part with those of everything before it. Neighbouring planes have the
// same counts, so one division serves them all.
struct Combine {
  static ALWAYS_INLINE void run(int64_t planes, double count_before, double count,
                                const double* part_mean, const double* part_squares, double* mean,
                                double* squares) {
    const double share = count / (count_before + count), weight = count_before * share;
#pragma omp simd
    for (int64_t i = 0; i < planes; ++i) {
      const double difference = part_mean[i] - mean[i];
      mean[i] += difference * share;
      squares[i] += part_squares[i] + difference * difference * weight;
    }
  }
};

// Adds the moments of a run of pixels of one plane.
template <typename Sum>
struct MeasureRun {
  static ALWAYS_INLINE void run(int64_t count, Elements<Sum> elements, double count_before,
                                double* mean, double* squares) {
    Sum buffer[kBlock];
    const Sum* x = elements.read(count, buffer);
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
    const double correction = static_cast<double>(deviation_sum) / count;  // rounding of the mean
    const double run_mean = rounded_mean + correction,
                 run_squares = square_sum - correction * deviation_sum;
    if (count_before == 0) {  // saves small planes the division
      *mean = run_mean, *squares = run_squares;
      return;
    }
    Combine::run(1, count_before, count, &run_mean, &run_squares, mean, squares);
  }
};

// Ends the body of an outer loop, so that the compiler vectorises the inner loop alone. If it
// vectorises both together, they are three times slower.
#define END_OF_OUTER_LOOP asm volatile("" ::: "memory")

constexpr int64_t kPixels = 64;  // per step, channels last

// Adds the moments of some pixels, channels last.
template <typename Sum>
struct MeasurePixels {
  static ALWAYS_INLINE void run(int64_t channels, int64_t pixels, const Elements<Sum>* elements,
                                Sum* buffer, double count_before, double* mean, double* squares) {
    const Sum* rows[kPixels];
    Sum rounded_mean[kBlock], deviation_sums[kBlock], square_sums[kBlock];
    for (Sum* sums : {rounded_mean, deviation_sums, square_sums}) {
      for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
    }
    for (int64_t p = 0; p < pixels; ++p) {
      const Sum* x = rows[p] = elements[p].read(channels, buffer + p * kBlock);
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) rounded_mean[c] += x[c];
      END_OF_OUTER_LOOP;
    }
    for (int64_t c = 0; c < channels; ++c) rounded_mean[c] /= static_cast<Sum>(pixels);
    for (int64_t p = 0; p < pixels; ++p) {
      const Sum* x = rows[p];
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const Sum deviation = x[c] - rounded_mean[c];
        deviation_sums[c] += deviation;
        square_sums[c] += deviation * deviation;
      }
      END_OF_OUTER_LOOP;
    }
    double part_mean[kBlock], part_squares[kBlock];
    const double share = 1.0 / pixels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const double correction = deviation_sums[c] * share;
      part_mean[c] = rounded_mean[c] + correction;
      part_squares[c] = square_sums[c] - correction * deviation_sums[c];
    }
    Combine::run(channels, count_before, static_cast<double>(pixels), part_mean, part_squares, mean,
                 squares);
  }
};

}  // namespace

template <typename Sum>
void measure_task(const Tasks& tasks, int64_t task, const Source<Sum>& x, double* found) {
  double *mean = found, *squares = found + tasks.width;
  const int64_t unit = task / tasks.parts, first = tasks.first_pixel(task),
                last = tasks.last_pixel(task);
  if (tasks.layout == Layout::contiguous) {
    tasks.for_each_block(task, [&](int64_t n, int64_t row, int64_t start, int64_t count, int64_t) {
      const int64_t plane = row - tasks.channel(unit);
      vectorised<MeasureRun<Sum>>(count, x.at(n, row, start), static_cast<double>(start - first),
                                  mean + plane, squares + plane);
    });
    return;
  }
  // A std::vector would be filled with zeros first.
  const std::unique_ptr<Sum[]> buffer(new Sum[kPixels * kBlock]);
  Elements<Sum> rows[kPixels];
  for (int64_t c = 0; c < tasks.channels; c += kBlock) {
    const int64_t channels = std::min(kBlock, tasks.channels - c);
    for (int64_t start = first; start < last; start += kPixels) {
      const int64_t pixels = std::min(kPixels, last - start);
      for (int64_t i = 0; i < pixels; ++i) rows[i] = x.at(unit, start + i, c);
      vectorised<MeasurePixels<Sum>>(channels, pixels, static_cast<const Elements<Sum>*>(rows),
                                     buffer.get(), static_cast<double>(start - first), mean + c,
                                     squares + c);
    }
  }
}

template void measure_task(const Tasks&, int64_t, const Source<float>&, double*);
template void measure_task(const Tasks&, int64_t, const Source<double>&, double*);

void combine_moments(const Tasks& tasks, double* found) {
  const int64_t width = tasks.width;
  for (int64_t part = 1; part < tasks.parts; ++part) {
    const double before = part * tasks.step,
                 count = std::min(tasks.step, tasks.pixels - part * tasks.step);
    const double* part_mean = found + 2 * width * part;
    vectorised<Combine>(width, before, count, part_mean, part_mean + width, found, found + width);
  }
}

namespace {

Tensor plane_moments(const Tensor& x) {
  check_features(x);
  const Layout layout = layout_of(x);
  const Tasks tasks(x, layout);
  const int64_t width = tasks.width;
  const Tensor moments =
      new_tensor(x, {2, tasks.batch, tasks.channels}, sum_dtype(x.scalar_type()));
  dispatch_sum(x.scalar_type(), [&](auto zero) {
    using Sum = decltype(zero);
    const Source<Sum> source(x, layout);
    // Allocated after Source, which fails first if x is too large to copy (expanded, for instance).
    std::vector<double> found(2 * width * tasks.count());
    tasks.for_each(
        [&](int64_t task) { measure_task(tasks, task, source, &found[2 * width * task]); });
    Sum* mean = moments.mutable_data_ptr<Sum>();
    Sum* squares = mean + tasks.planes();
    for (int64_t unit = 0; unit < tasks.units(); ++unit) {
      double* unit_moments = &found[2 * width * unit * tasks.parts];
      combine_moments(tasks, unit_moments);
      std::copy_n(unit_moments, width, mean + unit * width);
      std::copy_n(unit_moments + width, width, squares + unit * width);
    }
  });
  return moments;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, library) {
  library.impl("plane_moments", TORCH_BOX(&plane_moments));
}

}  // namespace spade_fast
