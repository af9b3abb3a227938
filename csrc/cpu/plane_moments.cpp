// plane_moments on the CPU: mean and sum of squared deviations of every plane (n, c) of x [N, C, *spatial], as [2, N, C].
//
// x is read once. Runs of a plane short enough for the first-level cache are measured in two passes, first the mean, then
// the deviations from it, and the runs' moments are combined exactly (Chan et al., 1979), in double precision: a large mean
// costs no accuracy, and the result does not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "tensors.h"

namespace spade_fast {
namespace {

struct Moments {
  double count = 0, mean = 0, squares = 0;

  void combine(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count;
    const double difference = other.mean - mean;
    mean += difference * (other.count / total);
    squares += other.squares + difference * difference * (count * other.count / total);
    count = total;
  }
};

constexpr int64_t kRun = 2048;        // elements of a contiguous plane measured at a time
constexpr int64_t kPixels = 64;       // pixels of a channels-last image measured at a time,
constexpr int64_t kChannels = 64;     // with so many channels of each
constexpr int64_t kBand = 64 * kPixels;  // pixels of one task: fixed, whatever the number of threads

// Where pixels follow each other: a run of one plane.
template <typename T, typename Sum>
Moments measure_run(const T* x, int64_t count) {
  Sum sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += static_cast<Sum>(x[i]);
  const Sum mean = sum / static_cast<Sum>(count);
  // The mean is rounded: the deviations' own sum corrects it.
  Sum deviations = 0, squares = 0;
#pragma omp simd reduction(+ : deviations, squares)
  for (int64_t i = 0; i < count; ++i) {
    const Sum deviation = static_cast<Sum>(x[i]) - mean;
    deviations += deviation;
    squares += deviation * deviation;
  }
  const double correction = static_cast<double>(deviations) / count;
  return {static_cast<double>(count), mean + correction, squares - correction * deviations};
}

template <typename T, typename Sum>
void measure_contiguous(const T* x, int64_t planes, int64_t pixels, Sum* mean, Sum* squares) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(pixels, 1));
  torch::stable::parallel_for(0, planes, grain, [=](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      Moments moments;
      for (int64_t start = 0; start < pixels; start += kRun) {
        moments.combine(measure_run<T, Sum>(x + plane * pixels + start, std::min(kRun, pixels - start)));
      }
      mean[plane] = static_cast<Sum>(moments.mean);
      squares[plane] = static_cast<Sum>(moments.squares);
    }
  });
}

// Where a pixel's channels follow each other: some pixels of some planes, `stride` elements from pixel to pixel.
template <typename T, typename Sum>
void measure_block(const T* x, int64_t pixels, int64_t channels, int64_t stride, Moments* moments) {
  Sum mean[kChannels] = {}, deviations[kChannels] = {}, squares[kChannels] = {};
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) mean[c] += static_cast<Sum>(x[pixel * stride + c]);
  }
  for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<Sum>(pixels);
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const Sum deviation = static_cast<Sum>(x[pixel * stride + c]) - mean[c];
      deviations[c] += deviation;
      squares[c] += deviation * deviation;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    const double correction = static_cast<double>(deviations[c]) / pixels;
    moments[c].combine({static_cast<double>(pixels), mean[c] + correction, squares[c] - correction * deviations[c]});
  }
}

template <typename T, typename Sum>
void measure_channels_last(const T* x, int64_t batch, int64_t channels, int64_t pixels, Sum* mean, Sum* squares) {
  const int64_t bands = (pixels + kBand - 1) / kBand;
  std::vector<Moments> moments(batch * bands * channels);
  torch::stable::parallel_for(0, batch * bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / bands, first = task % bands * kBand, last = std::min(first + kBand, pixels);
      for (int64_t pixel = first; pixel < last; pixel += kPixels) {
        for (int64_t c = 0; c < channels; c += kChannels) {
          measure_block<T, Sum>(x + (n * pixels + pixel) * channels + c, std::min(kPixels, last - pixel),
                                std::min(kChannels, channels - c), channels, &moments[task * channels + c]);
        }
      }
    }
  });
  for (int64_t n = 0; n < batch; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      Moments plane;
      for (int64_t band = 0; band < bands; ++band) plane.combine(moments[(n * bands + band) * channels + c]);
      mean[n * channels + c] = static_cast<Sum>(plane.mean);
      squares[n * channels + c] = static_cast<Sum>(plane.squares);
    }
  }
}

Tensor plane_moments(const Tensor& given) {
  const Layout layout = layout_of(given);
  const Tensor x = dense(given, layout);
  const int64_t batch = x.size(0), channels = x.size(1), pixels = pixels_of(x);
  Tensor moments = torch::stable::new_empty(x, {2, batch, channels}, sum_dtype(x.scalar_type()));
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Sum = sum_type<T>;
    Sum* mean = moments.mutable_data_ptr<Sum>();
    Sum* squares = mean + batch * channels;
    if (layout == Layout::channels_last) {
      measure_channels_last<T, Sum>(x.const_data_ptr<T>(), batch, channels, pixels, mean, squares);
    } else {
      measure_contiguous<T, Sum>(x.const_data_ptr<T>(), batch * channels, pixels, mean, squares);
    }
  });
  return moments;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, library) {
  library.impl("plane_moments", TORCH_BOX(&plane_moments));
}

}  // namespace spade_fast
