// What each kernel does for one task, and the operands that the kernels share. An operator runs its
// kernel's tasks in parallel; the operators of instance norm (instance.cpp) alternate between the
// tasks of two kernels.
#pragma once

#include <tuple>

#include "tasks.h"

namespace spade_fast {

// The operands of apply and of both backward kernels. β may be missing in backward, unless the
// activation is SiLU.
template <typename Sum>
struct Operands {
  Source<Sum> x, gamma, beta;
  Numbers<Sum> planes;
  Activation activation;
  Sum negative_slope, addend;  // the factor of x̂ is addend + γ: 1 + γ, or γ itself
  Signs signs;

  Operands(const Tensor& x, const Tensor& planes, const Tensor& gamma,
           const std::optional<Tensor>& beta, const std::optional<Tensor>& index,
           Activation activation, double negative_slope, bool plus_one, const Tensor& signs,
           Layout layout)
      : x(x, layout),
        gamma(gamma, layout, index),
        beta(beta ? *beta : gamma, layout, index),
        planes(planes),
        activation(activation),
        negative_slope(static_cast<Sum>(negative_slope)),
        addend(plus_one ? 1 : 0),
        signs(signs) {}

  // Fetches a block of x and its signs into the cache. Where tiles are looked up the processor does
  // not foresee that the next row's block follows.
  ALWAYS_INLINE void prefetch(int64_t n, int64_t row, int64_t start) const {
    x.prefetch(n, row, start), signs.prefetch(n, row, start);
  }
};

// plane_moments.cpp. measure_task adds a task's moments, mean and squared deviations, to found
// [2, width], which starts as zeros. combine_moments combines those of all tasks of a unit in place
// of its first task's.
template <typename Sum>
void measure_task(const Tasks& tasks, int64_t task, const Source<Sum>& x, double* found);
void combine_moments(const Tasks& tasks, double* found);

// apply.cpp
Tensor new_signs(const Tasks& tasks, const Tensor& x, Activation activation, bool keep_signs);
template <typename Sum>
void apply_task(const Tasks& tasks, int64_t task, const Operands<Sum>& modulation,
                const Target<Sum>& y);

// backward_sums.cpp. new_dense_gradients allocates dγ and dβ of dense γ and β; dβ has size 0
// without an activation. sums_task adds a task's sums Σq and Σq·(x − shift) to found [2, width],
// which starts as zeros. combine_sums adds those of all tasks of a unit and stores them in sums
// [2, N, C].
std::tuple<Tensor, Tensor> new_dense_gradients(const Tensor& x, Layout layout,
                                               Activation activation, ScalarType dtype);
template <typename Sum>
void sums_task(const Tasks& tasks, int64_t task, const Operands<Sum>& modulation,
               const Source<Sum>& dy, const Target<Sum>& dgamma, const Target<Sum>& dbeta,
               Sum* found);
template <typename Sum>
void combine_sums(const Tasks& tasks, int64_t unit, const Sum* found, Sum* sums);

// backward_input.cpp
template <typename Sum>
void input_task(const Tasks& tasks, int64_t task, const Operands<Sum>& modulation,
                const Source<Sum>& dy, const std::optional<Numbers<Sum>>& terms,
                const Target<Sum>& dx);

// The operators of these names.
std::tuple<Tensor, Tensor, Tensor> backward_sums(const Tensor& dy, const Tensor& x,
                                                 const Tensor& planes, const Tensor& gamma,
                                                 std::optional<Tensor> beta,
                                                 std::optional<Tensor> index,
                                                 std::optional<Tensor> order, const Tensor& signs,
                                                 std::optional<std::string> activation,
                                                 double negative_slope, bool plus_one);
Tensor backward_input(const Tensor& dy, const Tensor& x, const Tensor& planes, const Tensor& gamma,
                      std::optional<Tensor> beta, std::optional<Tensor> index, const Tensor& signs,
                      std::optional<Tensor> terms, std::optional<std::string> activation,
                      double negative_slope, bool plus_one);

}  // namespace spade_fast
