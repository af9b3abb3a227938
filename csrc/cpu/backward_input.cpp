// backward_input on the CPU: dx = scale·q + constant + slope·(x − shift), with q = g·(addend + γ);
// without terms dx = scale·q.
//
// dy, x, γ and one bit (or β) per element are read once, and each element of dx is written once.

#include "gradient.h"

namespace spade_fast {
namespace {

template <typename Sum, typename Number>
struct BackwardInputBlock {
  static ALWAYS_INLINE void run(int64_t count, BackwardBlock<Sum> block, Number shift, Number scale,
                                Number offset, Number constant, Number slope, bool has_terms,
                                Activation activation, Sum negative_slope, Sum addend,
                                Destination<Sum> place) {
    Sum buffer[kBlock], g[kBlock], deviation[kBlock], dx[kBlock];
    const Sum* gamma = block.gamma.read(count, buffer);
    gradient(count, block, gamma, shift, scale, offset, activation, negative_slope, addend, g,
             deviation);
    if (has_terms) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i)
        dx[i] = scale[i] * (g[i] * (addend + gamma[i])) + (slope[i] * deviation[i] + constant[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) dx[i] = scale[i] * (g[i] * (addend + gamma[i]));
    }
    place.write(count, dx);
  }
};

}  // namespace

template <typename Sum>
void input_task(const Tasks& tasks, int64_t task, const Operands<Sum>& m, const Source<Sum>& dy,
                const std::optional<Numbers<Sum>>& given_terms, const Target<Sum>& dx) {
  // Without terms any readable array will do: it is not used.
  const Numbers<Sum>& terms = given_terms ? *given_terms : m.planes;
  BackwardReader<Sum> reader(m, dy, true);
  tasks.for_each_block(task, [&](int64_t n, int64_t row, int64_t start, int64_t count,
                                 int64_t number) {
    const auto run = [&](auto shift, auto scale, auto offset, auto constant, auto slope) {
      vectorised<BackwardInputBlock<Sum, decltype(shift)>>(
          count, reader.at(n, row, start), shift, scale, offset, constant, slope,
          given_terms.has_value(), m.activation, m.negative_slope, m.addend, dx.at(n, row, start));
    };
    if (tasks.layout == Layout::contiguous) {
      run(m.planes.uniform(0, number), m.planes.uniform(1, number), m.planes.uniform(2, number),
          terms.uniform(0, number), terms.uniform(1, number));
    } else {
      run(m.planes.per_channel(0, number), m.planes.per_channel(1, number),
          m.planes.per_channel(2, number), terms.per_channel(0, number),
          terms.per_channel(1, number));
    }
  });
}

template void input_task(const Tasks&, int64_t, const Operands<float>&, const Source<float>&,
                         const std::optional<Numbers<float>>&, const Target<float>&);
template void input_task(const Tasks&, int64_t, const Operands<double>&, const Source<double>&,
                         const std::optional<Numbers<double>>&, const Target<double>&);

Tensor backward_input(const Tensor& dy, const Tensor& x, const Tensor& planes, const Tensor& gamma,
                      std::optional<Tensor> beta, std::optional<Tensor> index, const Tensor& signs,
                      std::optional<Tensor> terms, std::optional<std::string> activation_name,
                      double negative_slope, bool plus_one) {
  const Activation activation = activation_named(activation_name);
  check_backward_input(dy, x, planes, gamma, beta, index, signs, terms, activation);
  check_index(index, gamma);
  const Layout layout = layout_of(x);
  const Tasks tasks(x, layout, index.has_value());
  const Tensor dx = new_output(x, layout, x.scalar_type());
  dispatch_sum(promoted(x.scalar_type(), gamma.scalar_type()), [&](auto zero) {
    using Sum = decltype(zero);
    const Operands<Sum> modulation(x, planes, gamma, beta, index, activation, negative_slope,
                                   plus_one, signs, layout);
    const Source<Sum> source(dy, layout);
    std::optional<Numbers<Sum>> numbers;
    if (terms) numbers.emplace(*terms);
    const Target<Sum> target(dx, layout);
    tasks.for_each(
        [&](int64_t task) { input_task(tasks, task, modulation, source, numbers, target); });
  });
  return finished(dx, x, layout);
}

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, library) {
  library.impl("backward_input", TORCH_BOX(&backward_input));
}

}  // namespace spade_fast
