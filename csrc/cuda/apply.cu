// y = act(x̂·(addend + γ) + β), with x̂ = (x − shift)·scale + offset from the numbers of each plane,
// and the signs that the activation's derivative needs.
//
// A thread handles up to four items of V elements (`tiles` in plan.h), which share the loads of the
// numbers per plane. The kernel is bound by memory: it reads x, γ and β once and writes y once.

#include "kernels.h"
#include "modulation.h"

namespace spade_fast {
namespace {

template <int V, bool kLast, bool kWhole>
__global__ void __launch_bounds__(kThreads, 3) apply_kernel(Operands o, Division d, Rows y) {
  const Part<V, kLast, kWhole> part(o, d);
  const Cursors<kLast> in(o, part.image, part.channel);
  const Cursor to = in.in(y);
  const auto shift = part.numbers(o, o.planes, 0), scale = part.numbers(o, o.planes, 1),
             offset = part.numbers(o, o.planes, 2);
  // The row of the next item is loaded one iteration ahead, so that γ and β need not wait for it.
  uint32_t next_row = modulation_row(in, part.at(part.begin + threadIdx.y));
  for (uint32_t first = part.begin; first < part.end; first += blockDim.y) {
    const Elements elements = part.at(first + threadIdx.y);
    const uint32_t row = next_row;
    next_row = modulation_row(in, part.at(first + threadIdx.y + blockDim.y));
    const Raw x = load<V>(in.x, elements);
    const GammaBeta modulation = load_modulation<V>(in, elements, row, true);
    float values[V];
    unpack<V>(x, o.x.type, values);
#pragma unroll
    for (int k = 0; k < V; ++k) values[k] = (values[k] - shift[k]) * scale[k] + offset[k];
    modulate<V>(in, elements, values, modulation, to);
  }
}

}  // namespace

void apply(const Settings& settings, const Operands& o, const Division& d, const Rows& y) {
  specialised(settings, [&](auto vector, auto last, auto whole) {
    launch(apply_kernel<vector(), last(), whole()>, settings, d, 0, o, d, y);
  });
}

}  // namespace spade_fast
