// dγ = g·x̂, dβ = g, and Σq and Σq·(x − shift) of each plane, q = g·(1 + γ), of dense γ and β. Where they are a table: table_sums.cu.

#include "kernels.h"
#include "modulation.h"

namespace spade_fast {
namespace {

template <int V, bool kLast>
__global__ void __launch_bounds__(kThreads) backward_sums_kernel(Operands o, Division d, Rows dgamma, Rows dbeta, float* parts) {
  const Part<V, kLast> part(o, d);
  const auto shift = part.numbers(o, o.planes, 0), scale = part.numbers(o, o.planes, 1), offset = part.numbers(o, o.planes, 2);
  float q_sum[V] = {}, q_deviation_sum[V] = {};
  for (int64_t first = part.begin; first < part.end; first += blockDim.y) {
    const Place place = part.at(first + threadIdx.y);
    const Raw x = load<V>(place.in(o.x), o.x.type, place.span), dy = load<V>(place.in(o.dy), o.dy.type, place.span);
    const Modulation modulation = load_modulation<V, kLast>(o, place, o.activation == Activation::silu);
    const uint32_t signs = load_signs<V, kLast>(o, place);
    const Gradient<V> found = gradient<V>(o, x, dy, modulation, signs, shift, scale, offset);
    store_gradient<V>(place, found, scale, offset, dgamma, dbeta, q_sum, q_deviation_sum);
  }
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const int64_t split = part.split(d);
  part.store_numbers(o, parts, 2 * split, block_sum<V, kLast>(q_sum, scratch));
  part.store_numbers(o, parts, 2 * split + 1, block_sum<V, kLast>(q_deviation_sum, scratch));
}

__global__ void __launch_bounds__(kThreads) combine_sums_kernel(Operands o, int64_t splits, const float* parts, float* sums, float* terms) {
  const int64_t all = o.shape.images * o.shape.channels, plane = blockIdx.x * kThreads + threadIdx.x;
  if (plane >= all) return;
  float q_sum = 0, q_deviation_sum = 0;
  for (int64_t split = 0; split < splits; ++split) {
    q_sum += parts[2 * split * all + plane];
    q_deviation_sum += parts[(2 * split + 1) * all + plane];
  }
  if (sums != nullptr) {
    sums[plane] = q_sum;
    sums[all + plane] = q_deviation_sum;
    return;
  }
  const float scale = o.planes[all + plane], share = scale / -static_cast<float>(o.shape.pixels > 0 ? o.shape.pixels : 1);
  terms[plane] = q_sum * share;
  terms[all + plane] = q_deviation_sum * share * scale * scale;
}

}  // namespace

void backward_sums(const Settings& settings, const Operands& o, const Division& d, const Rows& dgamma, const Rows& dbeta, float* parts) {
  specialised(settings, [&](auto vector, auto last) {
    launch(backward_sums_kernel<vector(), last()>, settings, d, d.shared(1, last() ? vector() : 1), o, d, dgamma, dbeta, parts);
  });
}

void combine_sums(const Settings& settings, const Operands& o, int64_t splits, const float* parts, float* sums, float* terms) {
  launch(combine_sums_kernel, divide_up(o.shape.images * o.shape.channels, kThreads), dim3(kThreads), 0, settings.stream, o, splits, parts,
         sums, terms);
}

}  // namespace spade_fast
