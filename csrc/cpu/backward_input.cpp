// backward_input on the CPU: dx = scale·q + constant + slope·(x − shift), q = g·(1 + γ); without terms dx = scale·q.
//
// dy, x, γ and a bit (or β) of each element are read once, and each of dx is written once.

#include "backward.h"

namespace spade_fast {
namespace {

template <typename Sum, typename Number>
struct BackwardInputBlock {
  static ALWAYS_INLINE void run(int64_t count, const Sum* dy, const Sum* x, const Sum* gamma, const Sum* beta, const uint8_t* signs,
                                Number shift, Number scale, Number offset, Number constant, Number slope, bool has_terms,
                                Activation activation, Sum negative_slope, Sum* dx) {
    Sum g[kBlock], deviation[kBlock];
    gradient(count, dy, x, gamma, beta, signs, shift, scale, offset, activation, negative_slope, g, deviation);
    if (has_terms) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) dx[i] = scale[i] * (g[i] * (1 + gamma[i])) + (slope[i] * deviation[i] + constant[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) dx[i] = scale[i] * (g[i] * (1 + gamma[i]));
    }
  }
};

template <typename Sum>
void input_all(const Tasks& tasks, const BackwardSources<Sum>& sources, const Numbers<Sum>& terms, bool has_terms,
               const Target<Sum>& dx) {
  tasks.for_each([&](int64_t task) {
    Sum buffer[kBlock];
    tasks.for_each_block(task, [&](int64_t n, int64_t row, int64_t start, int64_t count, int64_t number) {
      Sum* block_dx = dx.place(n, row, start, buffer);
      sources.read(n, row, start, count, [&](auto... elements) {
        const auto run = [&](auto... numbers) {
          using Number = std::common_type_t<decltype(numbers)...>;
          vectorised<BackwardInputBlock<Sum, Number>>(count, elements..., numbers..., has_terms, sources.activation,
                                                      sources.negative_slope, block_dx);
        };
        const Numbers<Sum>& planes = sources.planes;
        if (tasks.layout == Layout::contiguous) {
          run(planes.uniform(0, number), planes.uniform(1, number), planes.uniform(2, number), terms.uniform(0, number),
              terms.uniform(1, number));
        } else {
          run(planes.per_channel(0, number), planes.per_channel(1, number), planes.per_channel(2, number),
              terms.per_channel(0, number), terms.per_channel(1, number));
        }
      });
      dx.write(n, row, start, count, block_dx);
    });
  });
}

Tensor backward_input(const Tensor& dy, const Tensor& x, const Tensor& planes, const Tensor& gamma, std::optional<Tensor> beta,
                      std::optional<Tensor> index, const Tensor& signs, std::optional<Tensor> terms,
                      std::optional<std::string> activation_name, double negative_slope) {
  const Layout layout = layout_of(x);
  const Tasks tasks(x, layout);
  const Tensor dx = new_output(x, layout, x.scalar_type());
  dispatch_sum(promoted(x.scalar_type(), gamma.scalar_type()), [&](auto zero) {
    using Sum = decltype(zero);
    const BackwardSources<Sum> sources(dy, x, planes, gamma, beta, index, signs, activation_named(activation_name), negative_slope,
                                       layout);
    input_all<Sum>(tasks, sources, Numbers<Sum>(terms ? *terms : planes), terms.has_value(), Target<Sum>(dx, layout));
  });
  return finished(dx, x, layout);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, library) {
  library.impl("backward_input", TORCH_BOX(&backward_input));
}

}  // namespace spade_fast
