// Instance norm in one pass over memory: forward from x to y, backward from x and dy to dγ, dβ and
// dx. A block holds its unit in shared memory (x, or x and dy) from the first sum to the last
// output, so that global memory is read once; or the blocks of a cluster do, one split each. Each
// thread reads from the held elements only what it stored itself, so they need no barrier.

#include "kernels.h"
#include "modulation.h"

namespace spade_fast {
namespace {

template <int V, bool kLast, bool kWhole>
__global__ void __launch_bounds__(kMostThreads, 1)
    forward_kernel(Operands o, Division d, float eps, Rows y, float* planes) {
  const Part<V, kLast, kWhole> part(o, d);
  const Cursors<kLast> in(o, part.image, part.channel);
  const Cursor to = in.in(y);
  Raw* held = reinterpret_cast<Raw*>(shared_memory());
  float* scratch = reinterpret_cast<float*>(shared_memory() + d.held_bytes);
  const auto held_at = [&](uint32_t item) {
    return (item - part.begin) * blockDim.x + threadIdx.x;
  };
  for (uint32_t item = part.begin + threadIdx.y; item < part.end; item += blockDim.y) {
    const Elements elements = part.at(item);
    load_async<V>(held + held_at(item), in.x.at(elements.item), o.x.type, elements.span);
  }
  wait_for_copies();
  float sum[V] = {}, deviations[V] = {}, squares[V] = {};
  for (uint32_t item = part.begin + threadIdx.y; item < part.end; item += blockDim.y) {
    if (part.at(item).span.count == 0) continue;
    float values[V];
    unpack<V>(held[held_at(item)], o.x.type, values);
#pragma unroll
    for (int k = 0; k < V; ++k) sum[k] += values[k];  // missing elements are zeros
  }
  const float share = 1 / static_cast<float>(o.shape.pixels);
  PerPlane<V, kLast> mean = unit_sum<V, kLast>(d, sum, scratch), correction, scale;
  for (float& value : mean.values) value *= share;
  for (uint32_t item = part.begin + threadIdx.y; item < part.end; item += blockDim.y) {
    const int count = part.at(item).span.count;
    if (count == 0) continue;
    float values[V];
    unpack<V>(held[held_at(item)], o.x.type, values);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float deviation = k < count ? values[k] - mean[k] : 0.0f;
      deviations[k] += deviation;
      squares[k] += deviation * deviation;
    }
  }
  // Corrects the rounding of the mean, which grows with the mean.
  correction = unit_sum<V, kLast>(d, deviations, scratch);
  scale = unit_sum<V, kLast>(d, squares, scratch);
  PerPlane<V, kLast> shift, offset = {};
#pragma unroll
  for (int k = 0; k < PerPlane<V, kLast>::kCount; ++k) {
    correction.values[k] *= share;
    scale.values[k] =
        1 / sqrtf(scale.values[k] * share - correction.values[k] * correction.values[k] + eps);
    shift.values[k] = mean.values[k] + correction.values[k];
  }
  if (part.split(d) == 0) {
    part.store_numbers(o, planes, 0, shift);
    part.store_numbers(o, planes, 1, scale);
    part.store_numbers(o, planes, 2, offset);
  }
  const auto finish = [&](int64_t item, const Elements& elements, const GammaBeta& modulation) {
    float values[V] = {};
    if (elements.span.count > 0) unpack<V>(held[held_at(item)], o.x.type, values);
#pragma unroll
    for (int k = 0; k < V; ++k) values[k] = (values[k] - mean[k] - correction[k]) * scale[k];
    modulate<V>(in, elements, values, modulation, to);
  };
  // Keeps the loads of two items in flight.
  for (uint32_t first = part.begin; first < part.end; first += 2 * blockDim.y) {
    const uint32_t item = first + threadIdx.y, other_item = item + blockDim.y;
    const Elements elements = part.at(item), other_elements = part.at(other_item);
    const GammaBeta modulation =
        load_modulation<V>(in, elements, modulation_row(in, elements), true);
    const GammaBeta other_modulation =
        load_modulation<V>(in, other_elements, modulation_row(in, other_elements), true);
    finish(item, elements, modulation);
    // Otherwise the second item belongs to the next split.
    if (first + blockDim.y < part.end) finish(other_item, other_elements, other_modulation);
  }
}

template <int V, bool kLast, bool kWhole, bool kSilu>
__global__ void __launch_bounds__(kMostThreads, 1)
    backward_kernel(Operands o, Division d, Rows dgamma, Rows dbeta, Rows dx) {
  const Part<V, kLast, kWhole> part(o, d);
  const Cursors<kLast> in(o, part.image, part.channel);
  const Cursor to_dgamma = in.in(dgamma);
  const Cursor to_dbeta = dbeta.data != nullptr ? in.in(dbeta) : Cursor{};
  const Cursor to_dx = in.in(dx);
  Raw *held_x = reinterpret_cast<Raw*>(shared_memory()),
      *held_dy = held_x + d.split_items * blockDim.x;
  float* scratch = reinterpret_cast<float*>(shared_memory() + d.held_bytes);
  const auto held_at = [&](uint32_t item) {
    return (item - part.begin) * blockDim.x + threadIdx.x;
  };
  for (uint32_t item = part.begin + threadIdx.y; item < part.end; item += blockDim.y) {
    const Elements elements = part.at(item);
    load_async<V>(held_x + held_at(item), in.x.at(elements.item), o.x.type, elements.span);
    load_async<V>(held_dy + held_at(item), in.dy.at(elements.item), o.dy.type, elements.span);
  }
  const PerPlane<V, kLast> shift = part.numbers(o, o.planes, 0),
                           scale = part.numbers(o, o.planes, 1), offset = {};
  float q_sum[V] = {}, q_deviation_sum[V] = {};
  wait_for_copies();
  // Calls f with the elements and the gradient of each item; keeps the loads of two items in
  // flight.
  const auto for_each = [&](auto&& f) {
    for (uint32_t item = part.begin + threadIdx.y; item < part.end; item += 2 * blockDim.y) {
      const uint32_t other_item = item + blockDim.y;
      const Elements elements = part.at(item), other_elements = part.at(other_item);
      const GammaBeta modulation =
          load_modulation<V>(in, elements, modulation_row(in, elements), kSilu);
      const GammaBeta other_modulation =
          load_modulation<V>(in, other_elements, modulation_row(in, other_elements), kSilu);
      const uint32_t signs = load_signs<V>(in, elements),
                     other_signs = load_signs<V>(in, other_elements);
      const uint32_t at = held_at(item), other_at = held_at(other_item);
      f(elements,
        gradient<V, kSilu>(o, held_x[at], held_dy[at], modulation, signs, shift, scale, offset));
      if (other_item >= part.end) continue;
      f(other_elements, gradient<V, kSilu>(o, held_x[other_at], held_dy[other_at], other_modulation,
                                           other_signs, shift, scale, offset));
    }
  };
  for_each([&](const Elements& elements, const Gradient<V>& found) {
    store_gradient<V>(elements, found, scale, offset, to_dgamma, to_dbeta, q_sum, q_deviation_sum);
  });
  const float share = 1 / static_cast<float>(o.shape.pixels);
  PerPlane<V, kLast> constant = unit_sum<V, kLast>(d, q_sum, scratch),
                     slope = unit_sum<V, kLast>(d, q_deviation_sum, scratch);
#pragma unroll
  for (int k = 0; k < PerPlane<V, kLast>::kCount; ++k) {
    constant.values[k] *= share;
    slope.values[k] *= share * scale.values[k] * scale.values[k];
  }
  for_each([&](const Elements& elements, const Gradient<V>& found) {  // γ is in the cache by now
    float values[V];
#pragma unroll
    for (int k = 0; k < V; ++k)
      values[k] =
          scale[k] * (found.g[k] * found.factor[k] - constant[k] - found.deviation[k] * slope[k]);
    store<V>(to_dx, elements, values);
  });
}

// One block per split; the splits of a unit form a cluster.
template <typename Kernel, typename... Arguments>
void launch_units(Kernel* kernel, const Settings& settings, const Division& d,
                  int64_t planes_of_column, Arguments... arguments) {
  launch_clusters(kernel, d.blocks(), d.splits, dim3(d.columns, d.lanes),
                  d.shared(1, planes_of_column), settings.stream, arguments...);
}

}  // namespace

int64_t most_blocks() { return knows_clusters(forward_kernel<4, false, false>) ? kCluster : 1; }

void instance_forward(const Settings& settings, const Operands& o, const Division& d, float eps,
                      const Rows& y, float* planes) {
  specialised(settings, [&](auto vector, auto last, auto whole) {
    launch_units(forward_kernel<vector(), last(), whole()>, settings, d, last() ? vector() : 1, o,
                 d, eps, y, planes);
  });
}

void instance_backward(const Settings& settings, const Operands& o, const Division& d,
                       const Rows& dgamma, const Rows& dbeta, const Rows& dx) {
  specialised(settings, o, [&](auto vector, auto last, auto whole, auto is_silu) {
    launch_units(backward_kernel<vector(), last(), whole(), is_silu()>, settings, d,
                 last() ? vector() : 1, o, d, dgamma, dbeta, dx);
  });
}

}  // namespace spade_fast
