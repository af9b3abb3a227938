// Mean and squared deviations of each plane. Each split of a plane is read once, and what is found is combined exactly
// (Chan et al. 1979), always in the same order. A mean is kept as the sum of two numbers, a value of the plane and what the mean is
// beyond it: one number would be rounded at each step, most where the mean is large.

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
  return {one.pivot, one.beyond + difference * share, one.squares + other.squares + difference * difference * (one.count * share), count};
}

__device__ Moments shuffled(const Moments& mine, int lanes) {
  return {__shfl_xor_sync(~0u, mine.pivot, lanes), __shfl_xor_sync(~0u, mine.beyond, lanes), __shfl_xor_sync(~0u, mine.squares, lanes),
          __shfl_xor_sync(~0u, mine.count, lanes)};
}

template <int V, bool kLast>
__global__ void __launch_bounds__(kThreads, 3) plane_moments_kernel(Operands o, Division d, float* parts) {
  constexpr int kCount = PerPlane<V, kLast>::kCount;
  const Part<V, kLast> part(o, d);
  Moments moments[V] = {};
  float count = 0;
  const auto add = [&](const Raw& raw, const Span& span) {
    float values[V];
    unpack<V>(raw, o.x.type, values);
    count += 1;  // an element that is not there is of the last item: none comes after it
    const float share = 1 / count;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (k >= span.count) continue;
      if (count == 1) moments[k].pivot = values[k];
      const float difference = (values[k] - moments[k].pivot) - moments[k].beyond;
      moments[k].beyond += difference * share;
      moments[k].squares += difference * difference * (1 - share);
      moments[k].count = count;
    }
  };
  for (int64_t item = part.begin + threadIdx.y; item < part.end; item += 2 * blockDim.y) {  // two loads under way
    const Place one = part.at(item), other = part.at(item + blockDim.y);
    const Raw x = load<V>(one.in(o.x), o.x.type, one.span), other_x = load<V>(other.in(o.x), o.x.type, other.span);
    add(x, one.span);
    add(other_x, other.span);
  }
  if (!kLast) {
#pragma unroll
    for (int k = 1; k < V; ++k) moments[0] = combined(moments[0], moments[k]);
  }
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, warps = blockDim.x * blockDim.y / 32;
  const int columns = kLast ? blockDim.x : 1, column = kLast ? threadIdx.x : 0;
  Moments* scratch = reinterpret_cast<Moments*>(shared_memory());
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    for (int lanes = columns; lanes < 32; lanes *= 2) moments[k] = combined(moments[k], shuffled(moments[k], lanes));
    if (thread % 32 < columns) scratch[(thread / 32 * kCount + k) * columns + column] = moments[k];
  }
  __syncthreads();
  if (threadIdx.y != 0) return;
  PerPlane<V, kLast> pivot, beyond, squares;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    Moments all = {};
    for (int warp = 0; warp < warps; ++warp) all = combined(all, scratch[(warp * kCount + k) * columns + column]);
    pivot.values[k] = all.pivot, beyond.values[k] = all.beyond, squares.values[k] = all.squares;
  }
  const int64_t split = part.split(d);
  part.store_numbers(o, parts, 3 * split, pivot);
  part.store_numbers(o, parts, 3 * split + 1, beyond);
  part.store_numbers(o, parts, 3 * split + 2, squares);
}

__global__ void __launch_bounds__(kCombiners) combine_moments_kernel(Operands o, Division d, const float* parts, float eps, float* moments,
                                                                     float* planes) {
  const int64_t all = o.shape.images * o.shape.channels, first = blockIdx.x * 32, loaded = first + threadIdx.x;
  const Moments found = over_splits<Moments>(d.splits, [&](int64_t split) -> Moments {
    if (loaded >= all) return {};
    const float* part = parts + kMomentParts * split * all + loaded;
    const int64_t left = o.shape.pixels - split * d.split_pixels;
    const float count = static_cast<float>(left < d.split_pixels ? left : d.split_pixels);
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
  planes[all + plane] = 1 / sqrtf(found.squares / static_cast<float>(o.shape.pixels > 0 ? o.shape.pixels : 1) + eps);
  planes[2 * all + plane] = 0;
}

}  // namespace

void plane_moments(const Settings& settings, const Operands& o, const Division& d, float* parts) {
  specialised(settings, [&](auto vector, auto last) {
    launch(plane_moments_kernel<vector(), last()>, settings, d, d.shared(4, last() ? vector() : 1), o, d, parts);
  });
}

void combine_moments(const Settings& settings, const Operands& o, const Division& d, const float* parts, float eps, float* moments,
                     float* planes) {
  launch_combination<Moments>(combine_moments_kernel, settings, o, d, parts, eps, moments, planes);
}

}  // namespace spade_fast
