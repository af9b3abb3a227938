// Instance norm in one pass: a block holds its planes in shared memory, from their moments to y, and from their sums to dx. Each
// thread reads there only what it put there itself.

#include "kernels.h"
#include "modulation.h"

namespace spade_fast {
namespace {

template <int V, bool kLast>
__global__ void __launch_bounds__(kMostThreads, 1) forward_kernel(Operands o, Division d, float eps, Rows y, float* planes) {
  const Part<V, kLast> part(o, d);
  Raw* held = reinterpret_cast<Raw*>(shared_memory());
  float* scratch = reinterpret_cast<float*>(shared_memory() + d.held_bytes);
  for (int64_t item = threadIdx.y; item < d.items; item += blockDim.y) {
    const Place place = part.at(item);
    load_async<V>(held + item * blockDim.x + threadIdx.x, place.in(o.x), o.x.type, place.span);
  }
  wait_for_copies();
  float sum[V] = {}, deviations[V] = {}, squares[V] = {};
  for (int64_t item = threadIdx.y; item < d.items; item += blockDim.y) {
    if (part.at(item).span.count == 0) continue;
    float values[V];
    unpack<V>(held[item * blockDim.x + threadIdx.x], o.x.type, values);
#pragma unroll
    for (int k = 0; k < V; ++k) sum[k] += values[k];  // zeros where there are no elements
  }
  const float share = 1 / static_cast<float>(o.shape.pixels);
  PerPlane<V, kLast> mean = block_sum<V, kLast>(sum, scratch), correction, scale;
  for (float& value : mean.values) value *= share;
  for (int64_t item = threadIdx.y; item < d.items; item += blockDim.y) {
    const int count = part.at(item).span.count;
    if (count == 0) continue;
    float values[V];
    unpack<V>(held[item * blockDim.x + threadIdx.x], o.x.type, values);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float deviation = k < count ? values[k] - mean[k] : 0.0f;
      deviations[k] += deviation;
      squares[k] += deviation * deviation;
    }
  }
  correction = block_sum<V, kLast>(deviations, scratch);  // the mean was rounded, most where it is large
  scale = block_sum<V, kLast>(squares, scratch);
  PerPlane<V, kLast> shift, offset = {};
#pragma unroll
  for (int k = 0; k < PerPlane<V, kLast>::kCount; ++k) {
    correction.values[k] *= share;
    scale.values[k] = 1 / sqrtf(scale.values[k] * share - correction.values[k] * correction.values[k] + eps);
    shift.values[k] = mean.values[k] + correction.values[k];
  }
  part.store_numbers(o, planes, 0, shift);
  part.store_numbers(o, planes, 1, scale);
  part.store_numbers(o, planes, 2, offset);
  for (int64_t first = 0; first < d.items; first += blockDim.y) {
    const int64_t item = first + threadIdx.y;
    const Place place = part.at(item);
    const Modulation modulation = load_modulation<V, kLast>(o, place, true);
    float values[V] = {};
    if (place.span.count > 0) unpack<V>(held[item * blockDim.x + threadIdx.x], o.x.type, values);
#pragma unroll
    for (int k = 0; k < V; ++k) values[k] = (values[k] - mean[k] - correction[k]) * scale[k];
    modulate<V, kLast>(o, place, values, modulation, y);
  }
}

template <int V, bool kLast>
__global__ void __launch_bounds__(kMostThreads, 1) backward_kernel(Operands o, Division d, Rows dgamma, Rows dbeta, Rows dx) {
  const Part<V, kLast> part(o, d);
  Raw *held_x = reinterpret_cast<Raw*>(shared_memory()), *held_dy = held_x + d.items * blockDim.x;
  float* scratch = reinterpret_cast<float*>(shared_memory() + d.held_bytes);
  for (int64_t item = threadIdx.y; item < d.items; item += blockDim.y) {
    const Place place = part.at(item);
    load_async<V>(held_x + item * blockDim.x + threadIdx.x, place.in(o.x), o.x.type, place.span);
    load_async<V>(held_dy + item * blockDim.x + threadIdx.x, place.in(o.dy), o.dy.type, place.span);
  }
  const PerPlane<V, kLast> shift = part.numbers(o, o.planes, 0), scale = part.numbers(o, o.planes, 1), offset = {};
  float q_sum[V] = {}, q_deviation_sum[V] = {};
  wait_for_copies();
  const auto gradient_at = [&](int64_t item, const Place& place) {
    const Modulation modulation = load_modulation<V, kLast>(o, place, o.activation == Activation::silu);
    const uint32_t signs = load_signs<V, kLast>(o, place);
    const int64_t at = item * blockDim.x + threadIdx.x;
    return gradient<V>(o, held_x[at], held_dy[at], modulation, signs, shift, scale, offset);
  };
  for (int64_t item = threadIdx.y; item < d.items; item += blockDim.y) {
    const Place place = part.at(item);
    store_gradient<V>(place, gradient_at(item, place), scale, offset, dgamma, dbeta, q_sum, q_deviation_sum);
  }
  const float share = 1 / static_cast<float>(o.shape.pixels);
  PerPlane<V, kLast> constant = block_sum<V, kLast>(q_sum, scratch), slope = block_sum<V, kLast>(q_deviation_sum, scratch);
#pragma unroll
  for (int k = 0; k < PerPlane<V, kLast>::kCount; ++k) {
    constant.values[k] *= share;
    slope.values[k] *= share * scale.values[k] * scale.values[k];
  }
  for (int64_t item = threadIdx.y; item < d.items; item += blockDim.y) {
    const Place place = part.at(item);
    const Gradient<V> found = gradient_at(item, place);  // γ comes from the cache
    float values[V];
#pragma unroll
    for (int k = 0; k < V; ++k) values[k] = scale[k] * (found.g[k] * found.one_plus[k] - constant[k] - found.deviation[k] * slope[k]);
    store<V>(place.in(dx), dx.type, place.span, values);
  }
}

}  // namespace

void instance_forward(const Settings& settings, const Operands& o, const Division& d, float eps, const Rows& y, float* planes) {
  specialised(settings, [&](auto vector, auto last) {
    launch(forward_kernel<vector(), last()>, settings, d, d.shared(1, last() ? vector() : 1), o, d, eps, y, planes);
  });
}

void instance_backward(const Settings& settings, const Operands& o, const Division& d, const Rows& dgamma, const Rows& dbeta,
                       const Rows& dx) {
  specialised(settings, [&](auto vector, auto last) {
    launch(backward_kernel<vector(), last()>, settings, d, d.shared(1, last() ? vector() : 1), o, d, dgamma, dbeta, dx);
  });
}

}  // namespace spade_fast
