// dx = scale·q + constant + slope·(x − shift), with q = g·(1 + γ).

#include "kernels.h"
#include "modulation.h"

namespace spade_fast {
namespace {

template <int V, bool kLast>
__global__ void __launch_bounds__(kThreads) backward_input_kernel(Operands o, Division d, const float* terms, Rows dx) {
  const Part<V, kLast> part(o, d);
  const auto shift = part.numbers(o, o.planes, 0), scale = part.numbers(o, o.planes, 1), offset = part.numbers(o, o.planes, 2);
  PerPlane<V, kLast> constant = {}, slope = {};
  if (terms != nullptr) constant = part.numbers(o, terms, 0), slope = part.numbers(o, terms, 1);
  const bool is_silu = o.activation == Activation::silu, reads_x = is_silu || terms != nullptr;
  for (int64_t first = part.begin; first < part.end; first += blockDim.y) {
    const Place place = part.at(first + threadIdx.y);
    Raw x = {};
    if (reads_x) x = load<V>(place.in(o.x), o.x.type, place.span);
    const Raw dy = load<V>(place.in(o.dy), o.dy.type, place.span);
    const Modulation modulation = load_modulation<V, kLast>(o, place, is_silu);
    const uint32_t signs = load_signs<V, kLast>(o, place);
    const Gradient<V> found = gradient<V>(o, x, dy, modulation, signs, shift, scale, offset);
    float values[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      values[k] = scale[k] * (found.g[k] * found.one_plus[k]);
      if (terms != nullptr) values[k] += constant[k] + slope[k] * found.deviation[k];
    }
    store<V>(place.in(dx), dx.type, place.span, values);
  }
}

}  // namespace

void backward_input(const Settings& settings, const Operands& o, const Division& d, const float* terms, const Rows& dx) {
  specialised(settings, [&](auto vector, auto last) { launch(backward_input_kernel<vector(), last()>, settings, d, 0, o, d, terms, dx); });
}

}  // namespace spade_fast
