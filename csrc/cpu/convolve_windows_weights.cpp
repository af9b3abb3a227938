// The gradients of the weights of a convolution at windows (convolve_windows.cpp), on the CPU.

#include "nonzeros.h"

namespace spade_fast {
namespace {

// Transposes [columns, unit], whose columns are filled up to whole units, to one unit of rows from
// `first` on, of which `rows` exist.
template <typename Sum, int kBytes>
struct FromColumns {
  static ALWAYS_INLINE void run(const Sum* from, Matrix<char> to, int64_t first, int64_t rows) {
    Sum block[kUnit<Sum>][kBlock];
    for (int64_t start = 0; start < to.columns; start += kBlock) {
      const int64_t count = std::min(kBlock, to.columns - start);
      for (int64_t column = 0; column < count; column += kUnit<Sum>) {
        const Sum* found[kUnit<Sum>];
        for (int64_t i = 0; i < kUnit<Sum>; ++i)
          found[i] = from + (start + column + i) * kUnit<Sum>;
        Transpose<Sum, kBytes>::run(found, block[0] + column, kBlock);
      }
      for (int64_t row = 0; row < rows; ++row)
        Destination<Sum>{to.at(first + row, start), to.type, false}.write(count, block[row]);
    }
  }
};

template <typename Sum>
std::vector<Tensor> weight_gradients(const std::vector<Tensor>& given_gradients,
                                     const Tensor& given_rows, const std::vector<Tensor>& weights,
                                     const Lists& lists, const Convolution& shape) {
  const Sizes<Sum> sizes(shape, weights, given_rows.size(0));
  const std::vector<Tensor> gradients = all_without_gaps(given_gradients);
  const Tensor rows = without_gaps(in_dtype(given_rows, kScalarType<Sum>));
  std::vector<Tensor> results;
  for (const Tensor& weight : weights) {
    const std::vector<int64_t> own(weight.sizes().begin(), weight.sizes().end());
    results.push_back(new_tensor(rows, own, weight.scalar_type()));
  }
  const Strided<Sum> factors = {rows.const_data_ptr<Sum>(), 1, sizes.in, sizes.rows};
  const NonzeroLists<Sum> nonzeros(rows, sizes.taps, sizes.in, factors);
  // Rows per step, so that their products' gradients stay in the cache.
  constexpr int64_t kStep = NonzeroLists<Sum>::kColumns;
  const int64_t windows = gradients[0].size(0);
  // No sum of the lists overflows where no gradient is larger.
  const Sum largest = kLargest<Sum> / 2 / std::max(1, lists.offsets[lists.count]);
  torch::stable::parallel_for(0, sizes.count(), 1, [&](int64_t begin, int64_t end) {
    const auto own = scratch<Sum>(windows * kUnit<Sum>),
               products = scratch<Sum>(kStep * sizes.columns());
    const auto matrix = scratch<Sum>(sizes.matrix());
    for (int64_t i = begin; i < end; ++i) {
      const Unit& unit = sizes.units[i];
      const Tensor &gradient = gradients[unit.weight], &result = results[unit.weight];
      vectorised<TakeUnit<Sum>>(matrix_of(gradient, gradient.size(1)), windows, unit.first,
                                unit.channels, own.get());
      std::fill_n(matrix.get(), sizes.in * sizes.columns(), Sum(0));
      const bool skips =
          nonzeros && vectorised<AllWithin<Sum>>(windows * kUnit<Sum>,
                                                 static_cast<const Sum*>(own.get()), largest);
      for (int64_t first = 0; first < sizes.rows; first += kStep) {
        const int64_t last = std::min(first + kStep, sizes.rows);
        product_gradients<Sum>(sizes, lists, own.get(), first, last, products.get());
        if (skips) {
          multiply(sizes.in, sizes.taps, nonzeros.at(first / kStep), products.get(),
                   sizes.columns(), matrix.get(), sizes.columns(), Update::add);
          continue;
        }
        const Strided<Sum> own_factors = {factors.data + first * sizes.in, 1, sizes.in,
                                          last - first};
        multiply(sizes.in, sizes.taps, own_factors, products.get(), sizes.columns(), matrix.get(),
                 sizes.columns(), Update::add);
      }
      in_vectors<FromColumns, Sum>(static_cast<const Sum*>(matrix.get()),
                                   output_matrix(result, sizes.in * sizes.taps), unit.first,
                                   unit.channels);
    }
  });
  return results;
}

std::vector<Tensor> convolve_windows_weights(std::vector<Tensor> gradients, const Tensor& rows,
                                             std::vector<Tensor> weights, const Tensor& offsets,
                                             const Tensor& listed) {
  const Convolution shape =
      check_convolve_windows_weights(gradients, rows, weights, offsets, listed);
  const Lists lists(offsets, listed, gradients[0].size(0));
  std::vector<Tensor> results;
  dispatch_sum(rows.scalar_type(), [&](auto zero) {
    results = weight_gradients<decltype(zero)>(gradients, rows, weights, lists, shape);
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, library) {
  library.impl("convolve_windows_weights", TORCH_BOX(&convolve_windows_weights));
}

}  // namespace spade_fast
