// What each kernel does of one task, and what they all read. An operator runs its kernel's tasks in
// parallel; instance norm's operators (instance.cpp) run those of two kernels in turn.
#pragma once

#include <tuple>

#include "tasks.h"

namespace spade_fast {

// What apply and both backward kernels read. beta may be missing where no kernel reads it:
// backward, but for SiLU.
template <typename Sum>
struct Operands {
  Source<Sum> x, gamma, beta;
  Numbers<Sum> planes;
  Activation activation;
  Sum negative_slope;
  Signs signs;

  Operands(const Tensor& x, const Tensor& planes, const Tensor& gamma,
           const std::optional<Tensor>& beta, const std::optional<Tensor>& index,
           Activation activation, double negative_slope, const Tensor& signs, Layout layout)
      : x(x, layout),
        gamma(gamma, layout, index),
        beta(beta ? *beta : gamma, layout, index),
        planes(planes),
        activation(activation),
        negative_slope(static_cast<Sum>(negative_slope)),
        signs(signs) {}
};

// plane_moments.cpp. The moments of a task, [2, width]: mean and squared deviations, zeros to begin
// with. Those of a unit, in place of its first task's, from those of all its tasks.
template <typename Sum>
void measure_task(const Tasks& tasks, int64_t task, const Source<Sum>& x, double* found);
void combine_moments(const Tasks& tasks, double* found);

// apply.cpp
Tensor new_signs(const Tasks& tasks, const Tensor& x, Activation activation, bool keep_signs);
template <typename Sum>
void apply_task(const Tasks& tasks, int64_t task, const Operands<Sum>& modulation,
                const Target<Sum>& y);

// backward_sums.cpp. dγ and dβ of dense γ and β, to be written: dβ has size 0 without an
// activation. A task's sums Σq and Σq·(x − shift), [2, width], zeros to begin with. Those of a
// unit, put into sums [2, N, C], from those of all its tasks.
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

// The operators of the same names.
std::tuple<Tensor, Tensor, Tensor> backward_sums(
    const Tensor& dy, const Tensor& x, const Tensor& planes, const Tensor& gamma,
    std::optional<Tensor> beta, std::optional<Tensor> index, std::optional<Tensor> order,
    const Tensor& signs, std::optional<std::string> activation, double negative_slope);
Tensor backward_input(const Tensor& dy, const Tensor& x, const Tensor& planes, const Tensor& gamma,
                      std::optional<Tensor> beta, std::optional<Tensor> index, const Tensor& signs,
                      std::optional<Tensor> terms, std::optional<std::string> activation,
                      double negative_slope);

}  // namespace spade_fast
