// Convolutions of the same rows at the distinct windows of a map alone, on the CPU.
//
// Result i is bias + Σ weight[:, :, t] · rows[r] over the pairs (r, t) that window i sees: row r at
// tap t. The results of all weights lie side by side. A thread computes all products
// weight[:, :, t] · rows[r] of one unit of a weight's output channels, which stay in its cache, and
// sums them there for every window. Products with numbers of rows that are zero are left
// out where that takes less time. Every sum is in a fixed order, whatever the number of threads.
// Elements of other dtypes than Sum are converted where a unit is read or written. `windows.Sums`
// has the lists: the entries r · taps + t of each window, and the windows of each (r, t).

#include <cstring>

#include "nonzeros.h"

namespace spade_fast {
namespace {

// Transposes one unit of rows from `first` on, of which `rows` exist, to [columns, unit] with zeros
// for the missing rows. The columns are filled up to whole units.
template <typename Sum, int kBytes>
struct ToColumns {
  static ALWAYS_INLINE void run(Matrix<const char> from, int64_t first, int64_t rows, Sum* to) {
    Sum block[kUnit<Sum>][kBlock] = {};
    for (int64_t start = 0; start < from.columns; start += kBlock) {
      const int64_t count = std::min(kBlock, from.columns - start);
      const Sum* found[kUnit<Sum>];
      for (int64_t row = 0; row < kUnit<Sum>; ++row) {
        found[row] = block[row];
        if (row >= rows) continue;
        found[row] = Elements<Sum>{from.at(first + row, start), from.type}.read(count, block[row]);
        // The last unit of columns may not be read beyond its end.
        if (count % kUnit<Sum> != 0 && found[row] != block[row])
          std::memcpy(block[row], found[row], count * sizeof(Sum)), found[row] = block[row];
      }
      for (int64_t column = 0; column < count; column += kUnit<Sum>) {
        Transpose<Sum, kBytes>::run(found, to + (start + column) * kUnit<Sum>, kUnit<Sum>);
        for (const Sum*& row : found) row += kUnit<Sum>;
      }
    }
  }
};

// Copies one unit [rows, unit] to the columns from `first` on, of which `columns` exist.
template <typename Sum>
struct GiveUnit {
  static ALWAYS_INLINE void run(const Sum* from, int64_t rows, Matrix<char> to, int64_t first,
                                int64_t columns) {
    for (int64_t row = 0; row < rows; ++row, from += kUnit<Sum>)
      Destination<Sum>{to.at(row, first), to.type, false}.write(columns, from);
  }
};

// Puts the bfloat16 of rows 2i and 2i + 1 of [in, columns], which are floats, into the two halves
// of row i.
struct JoinPairs {
  static ALWAYS_INLINE void run(int64_t in, int64_t columns, float* matrix) {
    for (int64_t i = 0; i < in; i += 2) {
      const float *even = matrix + i * columns, *odd = even + columns;
      float* pairs = matrix + i / 2 * columns;
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) {
        pairs[c] = bit_cast<float>(bit_cast<uint32_t>(even[c]) >> 16 |
                                   (bit_cast<uint32_t>(odd[c]) & 0xffff0000));
      }
    }
  }
};

// All products weight[:, :, t] · rows[r] of a unit of output channels: [rows, taps, unit].
template <typename Sum>
class Products {
 public:
  Products(const Sizes<Sum>& sizes, const Tensor& rows, const std::vector<Tensor>& weights)
      : sizes_(sizes),
        in_pairs_(instruction_set() == InstructionSet::avx512_bf16 && sizes.in % 2 == 0 &&
                  rows.scalar_type() == ScalarType::BFloat16),
        rows_(without_gaps(in_pairs_ ? rows : in_dtype(rows, kScalarType<Sum>))),
        weights_(all_without_gaps(weights)) {
    if (!in_pairs_) nonzeros_.emplace(rows_, sizes.taps, sizes.rows, factors());
  }

  // `matrix` is scratch memory of sizes.matrix().
  void compute(const Unit& unit, Sum* matrix, Sum* products) const {
    const int64_t columns = sizes_.columns();
    in_vectors<ToColumns, Sum>(matrix_of(weights_[unit.weight], sizes_.in * sizes_.taps),
                               unit.first, unit.channels, matrix);
    const Sum* weights = matrix;
#if defined(__x86_64__)
    if constexpr (sizeof(Sum) == 4) {
      if (in_pairs_) {
        vectorised<JoinPairs>(sizes_.in, columns, matrix);
        multiply_pairs(sizes_.rows, sizes_.taps, factors(), weights, columns, products, columns);
        return;
      }
    }
#endif
    if (!*nonzeros_ || !vectorised<AllWithin<Sum>>(sizes_.in * columns, weights, kLargest<Sum>)) {
      multiply(sizes_.rows, sizes_.taps, factors(), weights, columns, products, columns,
               Update::replace);
      return;
    }
    constexpr int64_t kStep = NonzeroLists<Sum>::kColumns;
    for (int64_t step = 0; step * kStep < sizes_.in; ++step)
      multiply(sizes_.rows, sizes_.taps, nonzeros_->at(step), weights + step * kStep * columns,
               columns, products, columns, step == 0 ? Update::replace : Update::extend);
  }

 private:
  Strided<Sum> factors() const {
    const int64_t depth = in_pairs_ ? sizes_.in / 2 : sizes_.in;
    return {static_cast<const Sum*>(rows_.const_data_ptr()), depth, 1, depth};
  }

  const Sizes<Sum>& sizes_;
  bool in_pairs_;
  Tensor rows_;
  std::vector<Tensor> weights_;
  std::optional<NonzeroLists<Sum>> nonzeros_;
};

template <typename Sum>
Tensor convolve(const Tensor& rows, const std::vector<Tensor>& weights,
                const std::vector<std::optional<Tensor>>& biases, const Lists& lists,
                const Convolution& shape, bool relu) {
  const Sizes<Sum> sizes(shape, weights, rows.size(0));
  const Tensor result = new_tensor(rows, {lists.count, shape.outputs}, rows.scalar_type());
  const Matrix<char> target = output_matrix(result, shape.outputs);
  const bool converts = rows.scalar_type() != kScalarType<Sum>;
  std::vector<Sum> bias(sizes.count() * kUnit<Sum>);
  auto begin = bias.begin();
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t out = weights[i].size(0);
    if (biases[i]) {
      const Tensor numbers = without_gaps(in_dtype(*biases[i], kScalarType<Sum>));
      std::copy_n(numbers.template const_data_ptr<Sum>(), out, begin);
    }
    begin += units<Sum>(out) * kUnit<Sum>;
  }
  const Products<Sum> all(sizes, rows, weights);
  torch::stable::parallel_for(0, sizes.count(), 1, [&](int64_t first, int64_t last) {
    const auto matrix = scratch<Sum>(sizes.matrix()),
               products = scratch<Sum>(sizes.rows * sizes.columns());
    std::unique_ptr<Sum[], Free> sums;
    for (int64_t i = first; i < last; ++i) {
      const Unit& unit = sizes.units[i];
      all.compute(unit, matrix.get(), products.get());
      // Behind the channels of a unit that is not full lie those of another.
      const bool directly = !converts && unit.channels == kUnit<Sum>;
      if (!directly && !sums) sums = scratch<Sum>(lists.count * kUnit<Sum>);
      sum_lists(lists, 0, lists.count, &bias[i * kUnit<Sum>], products.get(), relu,
                directly ? reinterpret_cast<Sum*>(target.at(0, unit.column)) : sums.get(),
                directly ? shape.outputs : kUnit<Sum>);
      if (!directly)
        vectorised<GiveUnit<Sum>>(static_cast<const Sum*>(sums.get()), lists.count, target,
                                  unit.column, unit.channels);
    }
  });
  return result;
}

Tensor convolve_windows(const Tensor& rows, std::vector<Tensor> weights,
                        std::vector<std::optional<Tensor>> biases, const Tensor& offsets,
                        const Tensor& listed, bool relu) {
  const Convolution shape = check_convolve_windows(rows, weights, biases, offsets, listed);
  const Lists lists(offsets, listed, rows.size(0) * shape.taps);
  std::optional<Tensor> result;
  dispatch_sum(rows.scalar_type(), [&](auto zero) {
    result = convolve<decltype(zero)>(rows, weights, biases, lists, shape, relu);
  });
  return *result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, library) {
  library.impl("convolve_windows", TORCH_BOX(&convolve_windows));
}

}  // namespace spade_fast
