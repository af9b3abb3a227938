// Instance norm on the CPU: instance_forward is plane_moments and apply in one operator,
// instance_backward is backward_sums and backward_input in one.
//
// The planes of instance norm are independent, so both steps can run plane by plane: what the
// second step reads is still in the cache, and the numbers per plane never go through Python.

#include <cmath>

#include "kernels.h"

namespace spade_fast {
namespace {

// The terms of dx that come through the statistics, for `count` planes from `first` on: constant
// and slope from Σq and Σq·(x − shift).
template <typename Sum>
void set_terms(const Tasks& tasks, int64_t first, int64_t count, const Sum* sums, const Sum* planes,
               Sum* terms) {
  const int64_t all = tasks.planes();
  for (int64_t number = first; number < first + count; ++number) {
    const Sum scale = planes[all + number], share = scale / -static_cast<Sum>(tasks.pixels);
    terms[number] = sums[number] * share;
    terms[all + number] = sums[all + number] * share * scale * scale;
  }
}

std::tuple<Tensor, Tensor, Tensor> instance_forward(const Tensor& x, const Tensor& gamma,
                                                    const Tensor& beta, std::optional<Tensor> index,
                                                    double eps,
                                                    std::optional<std::string> activation_name,
                                                    double negative_slope, bool keep_signs,
                                                    bool plus_one) {
  check_modulation(x, gamma, beta, index, true);
  check_index(index, gamma);
  const Layout layout = layout_of(x);
  const Tasks tasks(x, layout, index.has_value());
  const Activation activation = activation_named(activation_name);
  const Tensor y = new_output(x, layout, promoted(x.scalar_type(), gamma.scalar_type()));
  const Tensor signs = new_signs(tasks, x, activation, keep_signs);
  const ScalarType sum = sum_dtype(y.scalar_type());
  const Tensor planes = new_tensor(x, {3, tasks.batch, tasks.channels}, sum);
  dispatch_sum(sum, [&](auto zero) {
    using Sum = decltype(zero);
    Sum* shift = planes.mutable_data_ptr<Sum>();
    Sum *scale = shift + tasks.planes(), *offset = scale + tasks.planes();
    const Operands<Sum> modulation(x, planes, gamma, beta, index, activation, negative_slope,
                                   plus_one, signs, layout);
    const Target<Sum> target(y, layout);
    const int64_t width = tasks.width;
    std::vector<double> found(2 * width * tasks.count());
    tasks.in_two_passes(
        [&](int64_t task) { measure_task(tasks, task, modulation.x, &found[2 * width * task]); },
        [&](int64_t unit) {
          double* moments = &found[2 * width * unit * tasks.parts];
          combine_moments(tasks, moments);
          const int64_t first = tasks.first_plane(unit);
          for (int64_t i = 0; i < tasks.planes_of(unit); ++i) {
            const double variance = moments[width + i] / std::max<int64_t>(1, tasks.pixels);
            shift[first + i] = moments[i];
            scale[first + i] = 1 / std::sqrt(variance + eps);
            offset[first + i] = 0;
          }
        },
        [&](int64_t task) { apply_task(tasks, task, modulation, target); });
  });
  return {finished(y, x, layout), signs, in_dtype(planes, sum_dtype(x.scalar_type()))};
}

std::tuple<Tensor, Tensor, Tensor> instance_backward(
    const Tensor& dy, const Tensor& x, const Tensor& planes, const Tensor& gamma,
    std::optional<Tensor> beta, std::optional<Tensor> index, std::optional<Tensor> order,
    const Tensor& signs, std::optional<std::string> activation_name, double negative_slope,
    bool plus_one) {
  const Activation activation = activation_named(activation_name);
  check_backward_sums(dy, x, planes, gamma, beta, index, order, signs, activation);
  const Layout layout = layout_of(x);
  const Tasks tasks(x, layout);
  std::tuple<Tensor, Tensor, Tensor> gradients;
  dispatch_sum(promoted(x.scalar_type(), gamma.scalar_type()), [&](auto zero) {
    using Sum = decltype(zero);
    const Tensor plane_sums = in_dtype(without_gaps(planes), kScalarType<Sum>);
    const Sum* plane_data = plane_sums.template const_data_ptr<Sum>();
    const Tensor terms = new_tensor(plane_sums, {2, tasks.batch, tasks.channels}, kScalarType<Sum>);
    Sum* term_data = terms.template mutable_data_ptr<Sum>();
    if (index) {
      const auto [dgamma, dbeta, found] =
          backward_sums(dy, x, planes, gamma, beta, index, order, signs, activation_name,
                        negative_slope, plus_one);
      const Tensor sums = in_dtype(found, kScalarType<Sum>);
      set_terms(tasks, 0, tasks.planes(), sums.template const_data_ptr<Sum>(), plane_data,
                term_data);
      gradients = {dgamma, dbeta,
                   backward_input(dy, x, planes, gamma, beta, index, signs,
                                  in_dtype(terms, sum_dtype(x.scalar_type())), activation_name,
                                  negative_slope, plus_one)};
      return;
    }
    const Operands<Sum> modulation(x, plane_sums, gamma, beta, index, activation, negative_slope,
                                   plus_one, signs, layout);
    const Source<Sum> source(dy, layout);
    const auto [dgamma, dbeta] = new_dense_gradients(x, layout, activation, gamma.scalar_type());
    const Tensor dx = new_output(x, layout, x.scalar_type());
    const Target<Sum> dgamma_target(dgamma, layout), dbeta_target(dbeta, layout),
        dx_target(dx, layout);
    const std::optional<Numbers<Sum>> term_numbers(terms);
    const int64_t width = tasks.width;
    std::vector<Sum> found(2 * width * tasks.count()), sums(2 * tasks.planes());
    tasks.in_two_passes(
        [&](int64_t task) {
          sums_task(tasks, task, modulation, source, dgamma_target, dbeta_target,
                    &found[2 * width * task]);
        },
        [&](int64_t unit) {
          combine_sums(tasks, unit, &found[2 * width * unit * tasks.parts], sums.data());
          set_terms(tasks, unit * width, width, sums.data(), plane_data, term_data);
        },
        [&](int64_t task) {
          input_task(tasks, task, modulation, source, term_numbers, dx_target);
        });
    gradients = {finished(dgamma, x, layout), finished(dbeta, x, layout), finished(dx, x, layout)};
  });
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, library) {
  library.impl("instance_forward", TORCH_BOX(&instance_forward));
  library.impl("instance_backward", TORCH_BOX(&instance_backward));
}

}  // namespace spade_fast
