// What both backward kernels read: dy, x, γ, and of each element a bit of its sign, or β.
#pragma once

#include "tensors.h"

namespace spade_fast {

// Of a block: g = dy·act'(…) and the deviation x − shift.
template <typename Sum, typename Number>
ALWAYS_INLINE void gradient(int64_t count, const Sum* dy, const Sum* x, const Sum* gamma, const Sum* beta, const uint8_t* signs,
                            Number shift, Number scale, Number offset, Activation activation, Sum negative_slope, Sum* g,
                            Sum* deviation) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) deviation[i] = x[i] - shift[i];
  Sum values[kBlock];
  if (activation == Activation::silu) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) values[i] = (deviation[i] * scale[i] + offset[i]) * (1 + gamma[i]) + beta[i];
  }
  through_activation(count, activation, negative_slope, signs, values, dy, g);
}

template <typename Sum>
struct BackwardSources {
  Source<Sum> dy, x, gamma, beta;
  Numbers<Sum> planes;
  Signs signs;
  Activation activation;
  Sum negative_slope;

  // beta: for SiLU; without it γ is read in its place, and not used.
  BackwardSources(const Tensor& dy, const Tensor& x, const Tensor& planes, const Tensor& gamma, const std::optional<Tensor>& beta,
                  const std::optional<Tensor>& index, const Tensor& signs, Activation activation, double negative_slope, Layout layout)
      : dy(dy, layout),
        x(x, layout),
        gamma(gamma, layout, index),
        beta(beta ? *beta : gamma, layout, index),
        planes(planes),
        signs(signs),
        activation(activation),
        negative_slope(static_cast<Sum>(negative_slope)) {}

  // Calls f(dy, x, γ, β, signs) with the elements of a block.
  template <typename F>
  ALWAYS_INLINE void read(int64_t n, int64_t row, int64_t start, int64_t count, const F& f) const {
    Sum buffers[4][kBlock];
    const Sum* block_gamma = gamma.read(n, row, start, count, buffers[2]);
    f(dy.read(n, row, start, count, buffers[0]), x.read(n, row, start, count, buffers[1]), block_gamma,
      activation == Activation::silu ? beta.read(n, row, start, count, buffers[3]) : block_gamma, signs.at(n, row, start));
  }
};

}  // namespace spade_fast
