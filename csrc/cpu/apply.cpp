// apply on the CPU: y = act(x̂·(1 + γ) + β), and the signs that the activation's derivative needs.
//
// Each element of x, γ and β is read once and each of y written once; with an index γ and β are looked up in their table.

#include <tuple>

#include "tensors.h"

namespace spade_fast {
namespace {

template <typename Sum, typename Number>
struct ApplyBlock {
  static ALWAYS_INLINE void run(int64_t count, const Sum* x, const Sum* gamma, const Sum* beta, Number shift, Number scale,
                                Number offset, Activation activation, Sum negative_slope, Sum* y, uint8_t* signs) {
    Sum values[kBlock];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      values[i] = ((x[i] - shift[i]) * scale[i] + offset[i]) * (1 + gamma[i]) + beta[i];
    }
    if (signs != nullptr) pack_signs(count, activation, values, signs);
    activate(count, activation, negative_slope, values, y);
  }
};

template <typename Sum>
void apply_all(const Tasks& tasks, const Source<Sum>& x, const Source<Sum>& gamma, const Source<Sum>& beta,
               const Numbers<Sum>& planes, Activation activation, Sum negative_slope, const Target<Sum>& y, const Signs& signs) {
  tasks.for_each([&](int64_t task) {
    Sum buffers[4][kBlock];
    tasks.for_each_block(task, [&](int64_t n, int64_t row, int64_t start, int64_t count, int64_t number) {
      const Sum* block_x = x.read(n, row, start, count, buffers[0]);
      const Sum* block_gamma = gamma.read(n, row, start, count, buffers[1]);
      const Sum* block_beta = beta.read(n, row, start, count, buffers[2]);
      Sum* block_y = y.place(n, row, start, buffers[3]);
      const auto run = [&](auto shift, auto scale, auto offset) {
        vectorised<ApplyBlock<Sum, decltype(shift)>>(count, block_x, block_gamma, block_beta, shift, scale, offset, activation,
                                                     negative_slope, block_y, signs.at(n, row, start));
      };
      if (tasks.layout == Layout::contiguous) {
        run(planes.uniform(0, number), planes.uniform(1, number), planes.uniform(2, number));
      } else {
        run(planes.per_channel(0, number), planes.per_channel(1, number), planes.per_channel(2, number));
      }
      y.write(n, row, start, count, block_y);
    });
  });
}

std::tuple<Tensor, Tensor> apply(const Tensor& x, const Tensor& planes, const Tensor& gamma, const Tensor& beta,
                                 std::optional<Tensor> index, std::optional<std::string> activation_name, double negative_slope,
                                 bool keep_signs) {
  const Layout layout = layout_of(x);
  const Tasks tasks(x, layout);
  const Activation activation = activation_named(activation_name);
  const Tensor y = new_output(x, layout, promoted(x.scalar_type(), gamma.scalar_type()));
  const bool kept = keep_signs && keeps_signs(activation);
  const std::vector<int64_t> sizes = kept ? std::vector<int64_t>{tasks.batch, tasks.rows(), (tasks.length() + 7) / 8}
                                          : std::vector<int64_t>{0};
  const Tensor signs = torch::stable::new_empty(x, sizes, ScalarType::Byte);
  dispatch_sum(y.scalar_type(), [&](auto zero) {
    using Sum = decltype(zero);
    apply_all<Sum>(tasks, Source<Sum>(x, layout), Source<Sum>(gamma, layout, index), Source<Sum>(beta, layout, index),
                   Numbers<Sum>(planes), activation, static_cast<Sum>(negative_slope), Target<Sum>(y, layout), Signs(signs));
  });
  return {finished(y, x, layout), signs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, library) {
  library.impl("apply", TORCH_BOX(&apply));
}

}  // namespace spade_fast
