// dx = scale·q + constant + slope·(x − shift), with q = g·(addend + γ); without terms dx = scale·q.
// The work is divided as in apply.cu. The kernel is bound by memory: it reads dy, γ, x (with terms,
// or for SiLU) and one bit (or β) per element, and writes dx.

#include "kernels.h"
#include "modulation.h"

namespace spade_fast {
namespace {

// Blocks per SM. Before compute capability 9.0 the kernel needs more registers than three leave it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kInputBlocks = 2;
#else
constexpr int kInputBlocks = 3;
#endif

template <int V, bool kLast, bool kWhole, bool kSilu>
__global__ void __launch_bounds__(kThreads, kSilu ? 2 : kInputBlocks)
    backward_input_kernel(Operands o, Division d, const float* terms, Rows dx) {
  const Part<V, kLast, kWhole> part(o, d);
  const Cursors<kLast> in(o, part.image, part.channel);
  const Cursor to = in.in(dx);
  const auto shift = part.numbers(o, o.planes, 0), scale = part.numbers(o, o.planes, 1),
             offset = part.numbers(o, o.planes, 2);
  PerPlane<V, kLast> constant = {}, slope = {};
  if (terms != nullptr) constant = part.numbers(o, terms, 0), slope = part.numbers(o, terms, 1);
  const bool reads_x = kSilu || terms != nullptr;
  uint32_t next_row = modulation_row(in, part.at(part.begin + threadIdx.y));  // as in apply.cu
  for (uint32_t first = part.begin; first < part.end; first += blockDim.y) {
    const Elements elements = part.at(first + threadIdx.y);
    const uint32_t row = next_row;
    next_row = modulation_row(in, part.at(first + threadIdx.y + blockDim.y));
    Raw x = {};
    if (reads_x) x = load<V>(in.x, elements);
    const Raw dy = load<V>(in.dy, elements);
    const GammaBeta modulation = load_modulation<V>(in, elements, row, kSilu);
    const uint32_t signs = load_signs<V>(in, elements);
    const Gradient<V> found = gradient<V, kSilu>(o, x, dy, modulation, signs, shift, scale, offset);
    float values[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      values[k] = scale[k] * (found.g[k] * found.factor[k]);
      if (terms != nullptr) values[k] += constant[k] + slope[k] * found.deviation[k];
    }
    store<V>(to, elements, values);
  }
}

}  // namespace

void backward_input(const Settings& settings, const Operands& o, const Division& d,
                    const float* terms, const Rows& dx) {
  specialised(settings, o, [&](auto vector, auto last, auto whole, auto is_silu) {
    launch(backward_input_kernel<vector(), last(), whole(), is_silu()>, settings, d, 0, o, d, terms,
           dx);
  });
}

}  // namespace spade_fast
