// Mean and sum of squared deviations of each plane. x is read once: a block reduces one split of a
// unit in registers and shared memory, and combine_moments_kernel combines the splits. Moments are
// always combined exactly (Chan et al. 1979) and in a fixed order. A mean is kept as the sum of two
// numbers, `pivot`, a value of the plane, and `beyond`, the mean's distance from it. A single
// number would be rounded at each step, which costs most if the mean is large.

#include "kernels.h"
#include "walk.h"

namespace spade_fast {
namespace {

struct Moments {
  float pivot, beyond, squares, count;
};

__device__ Moments combined(const Moments& one, const Moments& other) {
  if (one.count == 0) return other;
  if (other.count == 0) return one;
  const float count = one.count + other.count, share = other.count / count;
  const float difference = (other.pivot - one.pivot) + (other.beyond - one.beyond);
  return {one.pivot, one.beyond + difference * share,
          one.squares + other.squares + difference * difference * (one.count * share), count};
}

__device__ Moments shuffled(const Moments& mine, int lanes) {
  return {__shfl_xor_sync(~0u, mine.pivot, lanes), __shfl_xor_sync(~0u, mine.beyond, lanes),
          __shfl_xor_sync(~0u, mine.squares, lanes), __shfl_xor_sync(~0u, mine.count, lanes)};
}

// A thread sums the differences of its values from the first of them, and their squares. Because
// the pivot is one of the values, cancellation loses at most as many digits as the number of values
// has.
template <int V, bool kLast, bool kWhole>
__global__ void __launch_bounds__(kThreads, 4)
    plane_moments_kernel(Operands o, Division d, float* parts) {
  constexpr int kCount = PerPlane<V, kLast>::kCount, kUnderWay = 4;
  const Part<V, kLast, kWhole> part(o, d);
  const Cursors<kLast> in(o, part.image, part.channel);
  float pivot[kCount] = {}, sum[kCount] = {}, squares[kCount] = {};
  int32_t count = 0;
  const auto add = [&](float value, int of) {
    const float beyond = value - pivot[of];
    sum[of] += beyond;
    squares[of] += beyond * beyond;
  };
  for (uint32_t item = part.begin + threadIdx.y; item < part.end; item += kUnderWay * blockDim.y) {
    Raw raw[kUnderWay];
#pragma unroll
    for (int i = 0; i < kUnderWay; ++i) raw[i] = load<V>(in.x, part.at(item + i * blockDim.y));
#pragma unroll
    for (int i = 0; i < kUnderWay; ++i) {
      const int here = part.at(item + i * blockDim.y).span.count;
      if (here == 0) continue;
      float values[V];
      unpack<V>(raw[i], o.x.type, values);
      if (count == 0) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) pivot[k] = values[k];
      }
      count += kLast ? 1 : here;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        // The results of channels that do not exist are never used.
        if (kLast || k < here) add(values[k], kLast ? k : 0);
      }
    }
  }
  Moments moments[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const float number = static_cast<float>(count), beyond = count > 0 ? sum[k] / number : 0.0f;
    const float about_mean = squares[k] - sum[k] * beyond;
    moments[k] = {pivot[k], beyond, about_mean < 0 ? 0.0f : about_mean, number};
  }
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, warps = blockDim.x * blockDim.y / 32;
  const int columns = kLast ? blockDim.x : 1, column = kLast ? threadIdx.x : 0;
  Moments* scratch = reinterpret_cast<Moments*>(shared_memory());  // [warps, columns, kCount]
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    for (int lanes = columns; lanes < 32; lanes *= 2)
      moments[k] = combined(moments[k], shuffled(moments[k], lanes));
    if (thread % 32 < columns) scratch[(thread / 32 * columns + column) * kCount + k] = moments[k];
  }
  __syncthreads();
  const int64_t all = o.shape.images * o.shape.channels, split = part.split(d);
  // One thread per plane.
  for (int plane = thread; plane < columns * kCount; plane += blockDim.x * blockDim.y) {
    Moments found = {};
    for (int warp = 0; warp < warps; ++warp)
      found = combined(found, scratch[warp * columns * kCount + plane]);
    const int64_t channel = part.channel - threadIdx.x * (kLast ? V : 0) + plane;
    if (channel >= o.shape.channels) continue;
    float* to = parts + kMomentParts * split * all + part.image * o.shape.channels + channel;
    to[0] = found.pivot, to[all] = found.beyond, to[2 * all] = found.squares;
  }
}

__global__ void __launch_bounds__(kCombiners)
    combine_moments_kernel(Operands o, Division d, const float* parts, float eps, float* moments,
                           float* planes) {
  const int64_t all = o.shape.images * o.shape.channels, first = blockIdx.x * 32,
                loaded = first + threadIdx.x;
  const Moments found = over_splits<Moments>(d.splits, [&](int64_t split) -> Moments {
    if (loaded >= all) return {};
    const float* part = parts + kMomentParts * split * all + loaded;
    // In this form: nvcc 13.0 spills registers on sm_100 if the pixels that are left are computed.
    const int64_t end = (split + 1) * d.split_pixels;
    const int64_t missing = end > o.shape.pixels ? end - o.shape.pixels : 0;
    const float count = static_cast<float>(d.split_pixels - missing);
    return {__ldg(part), __ldg(part + all), __ldg(part + 2 * all), count};
  });
  const int64_t plane = first + threadIdx.y;
  if (threadIdx.x != 0 || plane >= all) return;
  const float mean = found.pivot + found.beyond;
  if (moments != nullptr) {
    moments[plane] = mean;
    moments[all + plane] = found.squares;
    return;
  }
  planes[plane] = mean;
  planes[all + plane] =
      1 / sqrtf(found.squares / static_cast<float>(o.shape.pixels > 0 ? o.shape.pixels : 1) + eps);
  planes[2 * all + plane] = 0;
}

}  // namespace

void plane_moments(const Settings& settings, const Operands& o, const Division& d, float* parts) {
  specialised(settings, [&](auto vector, auto last, auto whole) {
    launch(plane_moments_kernel<vector(), last(), whole()>, settings, d,
           d.shared(4, last() ? vector() : 1), o, d, parts);
  });
}

void combine_moments(const Settings& settings, const Operands& o, const Division& d,
                     const float* parts, float eps, float* moments, float* planes) {
  launch_combination<Moments>(combine_moments_kernel, settings, o, d, parts, eps, moments, planes);
}

}  // namespace spade_fast
