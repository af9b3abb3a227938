// apply on the CPU: y = act(x̂·(addend + γ) + β), with x̂ = (x − shift)·scale + offset, and the
// signs that the activation's derivative needs.
//
// The kernel is bound by memory: each element of x, γ and β is read once and each element of y is
// written once. With an index, γ and β are looked up in their table.

#include "kernels.h"

namespace spade_fast {
namespace {

template <typename Sum, typename Number>
struct ApplyBlock {
  static ALWAYS_INLINE void run(int64_t count, Elements<Sum> x_elements,
                                Elements<Sum> gamma_elements, Elements<Sum> beta_elements,
                                Number shift, Number scale, Number offset, Activation activation,
                                Sum negative_slope, Sum addend, Destination<Sum> y,
                                uint8_t* signs) {
    Sum buffers[3][kBlock], values[kBlock];
    const Sum *x = x_elements.read(count, buffers[0]),
              *gamma = gamma_elements.read(count, buffers[1]),
              *beta = beta_elements.read(count, buffers[2]);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      values[i] = ((x[i] - shift[i]) * scale[i] + offset[i]) * (addend + gamma[i]) + beta[i];
    }
    if (signs != nullptr) pack_signs(count, activation, values, signs);
    activate(count, activation, negative_slope, values);
    y.write(count, values);
  }
};

}  // namespace

Tensor new_signs(const Tasks& tasks, const Tensor& x, Activation activation, bool keep_signs) {
  const bool kept = keep_signs && keeps_signs(activation);
  return new_tensor(x,
                    kept ? std::vector<int64_t>{tasks.batch, tasks.rows(), (tasks.length() + 7) / 8}
                         : std::vector<int64_t>{0},
                    ScalarType::Byte);
}

template <typename Sum>
void apply_task(const Tasks& tasks, int64_t task, const Operands<Sum>& m, const Target<Sum>& y) {
  Reader<Sum> gamma(m.gamma), beta(m.beta);
  tasks.for_each_block(task, [&](int64_t n, int64_t row, int64_t start, int64_t count,
                                 int64_t number) {
    if (m.gamma.needs_tiles()) m.prefetch(n, row + 1, start);
    const auto run = [&](auto shift, auto scale, auto offset) {
      vectorised<ApplyBlock<Sum, decltype(shift)>>(
          count, m.x.at(n, row, start), gamma.at(n, row, start), beta.at(n, row, start), shift,
          scale, offset, m.activation, m.negative_slope, m.addend, y.at(n, row, start),
          m.signs.at(n, row, start));
    };
    if (tasks.layout == Layout::contiguous) {
      run(m.planes.uniform(0, number), m.planes.uniform(1, number), m.planes.uniform(2, number));
    } else {
      run(m.planes.per_channel(0, number), m.planes.per_channel(1, number),
          m.planes.per_channel(2, number));
    }
  });
}

template void apply_task(const Tasks&, int64_t, const Operands<float>&, const Target<float>&);
template void apply_task(const Tasks&, int64_t, const Operands<double>&, const Target<double>&);

namespace {

// Computes y, into a new tensor or `out`, and its signs. out may be x or γ: each block is read
// before it is written.
std::tuple<Tensor, Tensor> modulated(const Tensor& x, const Tensor& planes, const Tensor& gamma,
                                     const Tensor& beta, const std::optional<Tensor>& index,
                                     const std::optional<std::string>& activation_name,
                                     double negative_slope, bool keep_signs, bool plus_one,
                                     const std::optional<Tensor>& out) {
  check_apply(x, planes, gamma, beta, index);
  if (out) check_out(*out, x, gamma);
  check_index(index, gamma);
  const Layout layout = layout_of(x);
  const Tasks tasks(x, layout, index.has_value());
  const Activation activation = activation_named(activation_name);
  const Tensor y =
      out ? *out : new_output(x, layout, promoted(x.scalar_type(), gamma.scalar_type()));
  const Tensor signs = new_signs(tasks, x, activation, keep_signs);
  dispatch_sum(y.scalar_type(), [&](auto zero) {
    using Sum = decltype(zero);
    const Operands<Sum> modulation(x, planes, gamma, beta, index, activation, negative_slope,
                                   plus_one, signs, layout);
    const Target<Sum> target(y, layout);
    tasks.for_each([&](int64_t task) { apply_task(tasks, task, modulation, target); });
  });
  return {out ? y : finished(y, x, layout), signs};
}

std::tuple<Tensor, Tensor> apply(const Tensor& x, const Tensor& planes, const Tensor& gamma,
                                 const Tensor& beta, std::optional<Tensor> index,
                                 std::optional<std::string> activation, double negative_slope,
                                 bool keep_signs, bool plus_one) {
  return modulated(x, planes, gamma, beta, index, activation, negative_slope, keep_signs, plus_one,
                   std::nullopt);
}

void apply_out(const Tensor& x, const Tensor& planes, const Tensor& gamma, const Tensor& beta,
               std::optional<Tensor> index, std::optional<std::string> activation,
               double negative_slope, Tensor out, bool plus_one) {
  modulated(x, planes, gamma, beta, index, activation, negative_slope, false, plus_one, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, library) {
  library.impl("apply", TORCH_BOX(&apply));
  library.impl("apply_out", TORCH_BOX(&apply_out));
}

}  // namespace spade_fast
