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

// Reads them for one task: γ if the kernel or SiLU needs it, and β for SiLU only.
template <typename Sum>
class BackwardReader {
 public:
  BackwardReader(const Operands<Sum>& modulation, const Source<Sum>& dy, bool needs_gamma)
      : m_(modulation), dy_(dy), gamma_(m_.gamma), beta_(m_.beta), needs_gamma_(needs_gamma) {}

  BackwardBlock<Sum> at(int64_t n, int64_t row, int64_t start) {
    if (m_.gamma.needs_tiles()) m_.prefetch(n, row + 1, start), dy_.prefetch(n, row + 1, start);
    BackwardBlock<Sum> block = {dy_.at(n, row, start), m_.x.at(n, row, start)};
    const bool silu = m_.activation == Activation::silu;
    if (needs_gamma_ || silu) block.gamma = gamma_.at(n, row, start);
    if (silu) block.beta = beta_.at(n, row, start);
    block.signs = m_.signs.at(n, row, start);
    return block;
  }

 private:
  const Operands<Sum>& m_;
  const Source<Sum>& dy_;
  Reader<Sum> gamma_, beta_;
  bool needs_gamma_;
};

// Takes γ already converted to Sum, because the callers need it too; here only SiLU reads it.
template <typename Sum, typename Number>
ALWAYS_INLINE void gradient(int64_t count, const BackwardBlock<Sum>& block, const Sum* gamma,
                            Number shift, Number scale, Number offset, Activation activation,
                            Sum negative_slope, Sum addend, Sum* g, Sum* deviation) {
  Sum buffers[3][kBlock];
  const Sum *x = block.x.read(count, buffers[0]), *dy = block.dy.read(count, buffers[1]);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) deviation[i] = x[i] - shift[i];
  Sum values[kBlock];
  if (activation == Activation::silu) {
    const Sum* beta = block.beta.read(count, buffers[2]);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      values[i] = (deviation[i] * scale[i] + offset[i]) * (addend + gamma[i]) + beta[i];
  }
  through_activation(count, activation, negative_slope, block.signs, values, dy, g);
}

}  // namespace spade_fast
