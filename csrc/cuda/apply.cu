// y = act(x̂·(1 + γ) + β), with x̂ from numbers of each plane, and the signs that the activation's derivative needs.

#include "kernels.h"
#include "modulation.h"

namespace spade_fast {
namespace {

template <int V, bool kLast>
__global__ void __launch_bounds__(kThreads, 3) apply_kernel(Operands o, Division d, Rows y) {
  const Part<V, kLast> part(o, d);
  const auto shift = part.numbers(o, o.planes, 0), scale = part.numbers(o, o.planes, 1), offset = part.numbers(o, o.planes, 2);
  for (int64_t first = part.begin; first < part.end; first += blockDim.y) {
    const Place place = part.at(first + threadIdx.y);
    const Raw x = load<V>(place.in(o.x), o.x.type, place.span);
    const Modulation modulation = load_modulation<V, kLast>(o, place, true);
    float values[V];
    unpack<V>(x, o.x.type, values);
#pragma unroll
    for (int k = 0; k < V; ++k) values[k] = (values[k] - shift[k]) * scale[k] + offset[k];
    modulate<V, kLast>(o, place, values, modulation, y);
  }
}

}  // namespace

void apply(const Settings& settings, const Operands& o, const Division& d, const Rows& y) {
  specialised(settings, [&](auto vector, auto last) { launch(apply_kernel<vector(), last()>, settings, d, 0, o, d, y); });
}

}  // namespace spade_fast
