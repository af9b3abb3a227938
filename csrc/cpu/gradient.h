// The start of both backward kernels: for a block, g = dy·act'(…) and the deviation x − shift.
#pragma once

#include "kernels.h"

namespace spade_fast {

// A block of dy, x, γ and the signs of y, and of β for SiLU.
template <typename Sum>
struct BackwardBlock {
  Elements<Sum> dy, x, gamma, beta;
  const uint8_t* signs;
};

template <typename Sum>
BackwardBlock<Sum> backward_block(const Operands<Sum>& m, const Source<Sum>& dy, int64_t n,
                                  int64_t row, int64_t start) {
  return {dy.at(n, row, start), m.x.at(n, row, start), m.gamma.at(n, row, start),
          m.beta.at(n, row, start), m.signs.at(n, row, start)};
}

// Takes γ already converted to Sum, because the callers need it too; here only SiLU reads it.
template <typename Sum, typename Number>
ALWAYS_INLINE void gradient(int64_t count, const BackwardBlock<Sum>& block, const Sum* gamma,
                            Number shift, Number scale, Number offset, Activation activation,
                            Sum negative_slope, Sum* g, Sum* deviation) {
  Sum buffers[3][kBlock];
  const Sum *x = block.x.read(count, buffers[0]), *dy = block.dy.read(count, buffers[1]);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) deviation[i] = x[i] - shift[i];
  Sum values[kBlock];
  if (activation == Activation::silu) {
    const Sum* beta = block.beta.read(count, buffers[2]);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      values[i] = (deviation[i] * scale[i] + offset[i]) * (1 + gamma[i]) + beta[i];
  }
  through_activation(count, activation, negative_slope, block.signs, values, dy, g);
}

}  // namespace spade_fast
