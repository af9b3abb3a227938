// A convolution at the distinct windows of a map alone, on the CPU, and the gradients of its weight
// and rows.
//
// Result i is bias + Σ weight[:, :, t] · rows[r] over the pairs (r, t) that window i sees: row r at
// tap t. A thread computes all products weight[:, :, t] · rows[r] of one unit of output channels
// (64 bytes), which stay in its cache, and sums them there for every window. Every sum is in a
// fixed order, whatever the number of threads. Elements of other dtypes than Sum are converted
// where a unit is read or written. `layout.Sums` has the lists: the entries r · taps + t of each
// window, and the windows of each (r, t).

#include <memory>
#include <type_traits>

#include "matrix.h"
#include "tensors.h"

namespace spade_fast {
namespace {

// Sum i is over the entries numbers[offsets[i]] to numbers[offsets[i + 1] − 1].
struct Lists {
  Tensor offsets_owner, numbers_owner;
  const int32_t *offsets, *numbers;
  int64_t count;

  // Refuses invalid offsets, and numbers that are not below `bound`.
  Lists(const Tensor& given_offsets, const Tensor& given_numbers, int64_t bound)
      : offsets_owner(without_gaps(given_offsets)),
        numbers_owner(without_gaps(given_numbers)),
        offsets(offsets_owner.const_data_ptr<int32_t>()),
        numbers(numbers_owner.const_data_ptr<int32_t>()),
        count(given_offsets.numel() - 1) {
    STD_TORCH_CHECK(offsets[0] == 0 && !vectorised<EverFalls>(count + 1, offsets) &&
                        offsets[count] == numbers_owner.numel(),
                    "spade_fast: offsets has numbers from ", offsets[0], " to ", offsets[count],
                    "; they should begin at 0, never decrease, and end at ", numbers_owner.numel(),
                    ", the length of the list");
    check_range(numbers_owner, "listed", bound);
  }
};

// One unit of columns of sums `first` to `last` − 1. Sum i starts from `begin` and is stored at row
// i − first of `to`.
template <typename Sum, int kBytes>
struct SumListed : Vectors<Sum, kBytes> {
  using typename Vectors<Sum, kBytes>::Vector;
  using Vectors<Sum, kBytes>::at, Vectors<Sum, kBytes>::kOfUnit;

  static ALWAYS_INLINE void run(int64_t first, int64_t last, const int32_t* offsets,
                                const int32_t* numbers, const Sum* begin, const Sum* from,
                                int64_t from_row, Sum* to, int64_t to_row) {
    for (int64_t i = first; i < last; ++i, to += to_row) {
      Vector sums[kOfUnit];
#pragma GCC unroll 4
      for (int v = 0; v < kOfUnit; ++v) sums[v] = at(begin, v);
      for (int32_t place = offsets[i]; place < offsets[i + 1]; ++place) {
        const Sum* row = from + numbers[place] * from_row;
#pragma GCC unroll 4
        for (int v = 0; v < kOfUnit; ++v) sums[v] += at(row, v);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kOfUnit; ++v) at(to, v) = sums[v];
    }
  }
};

// Transposes from [unit, columns], whose first `rows` rows exist, to [columns, unit] with zeros for
// the missing rows; and back.
template <typename Sum, typename Element>
struct ToColumns {
  static ALWAYS_INLINE void run(int64_t rows, int64_t columns, const Element* from, Sum* to) {
    for (int64_t column = 0; column < columns; ++column) {
      for (int64_t row = 0; row < kUnit<Sum>; ++row)
        to[column * kUnit<Sum> + row] = row < rows ? load(from[row * columns + column]) : 0;
    }
  }
};

template <typename Sum, typename Element>
struct FromColumns {
  static ALWAYS_INLINE void run(int64_t rows, int64_t columns, const Sum* from, Element* to) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column)
        store(to[row * columns + column], from[column * kUnit<Sum> + row]);
    }
  }
};

// Copies one unit of columns, of which the first `columns` exist, to [rows, unit] with zeros for
// the missing columns; and back.
template <typename Sum, typename Element>
struct TakeUnit {
  static ALWAYS_INLINE void run(int64_t rows, int64_t columns, const Element* from,
                                int64_t from_row, Sum* to) {
    for (int64_t row = 0; row < rows; ++row, from += from_row, to += kUnit<Sum>) {
#pragma omp simd
      for (int64_t c = 0; c < kUnit<Sum>; ++c) to[c] = c < columns ? load(from[c]) : 0;
    }
  }
};

template <typename Sum, typename Element>
struct GiveUnit {
  static ALWAYS_INLINE void run(int64_t rows, int64_t columns, const Sum* from, Element* to,
                                int64_t to_row) {
    for (int64_t row = 0; row < rows; ++row, from += kUnit<Sum>, to += to_row) {
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) store(to[c], from[c]);
    }
  }
};

template <typename Sum>
std::unique_ptr<Sum[]> scratch(int64_t size) {
  return std::unique_ptr<Sum[]>(new Sum[size]);
}

// The sizes of a convolution. Output channels are counted in units (`blocks`), the last padded.
template <typename Sum>
struct Sizes {
  int64_t rows, in, out, taps, blocks;

  Sizes(const Tensor& weight, int64_t rows)
      : rows(rows), in(weight.size(1)), out(weight.size(0)), taps(1), blocks(units<Sum>(out)) {
    for (int64_t dim = 2; dim < weight.dim(); ++dim) taps *= weight.size(dim);
  }

  int64_t columns() const { return taps * kUnit<Sum>; }
  int64_t first(int64_t block) const { return block * kUnit<Sum>; }
  int64_t channels(int64_t block) const { return std::min(kUnit<Sum>, out - first(block)); }
};

// x [rows, whole units] without the padding of its last unit.
Tensor without_filling(Tensor x, int64_t columns) {
  return x.size(1) == columns ? x : without_gaps(torch::stable::narrow(x, 1, 0, columns));
}

template <typename Sum, typename Element>
Tensor convolve(const Tensor& given_rows, const Tensor& given_weight,
                const std::optional<Tensor>& given_bias, const Lists& lists) {
  constexpr bool kConverts = !std::is_same_v<Sum, Element>;
  const Sizes<Sum> sizes(given_weight, given_rows.size(0));
  const Tensor rows = without_gaps(in_dtype(given_rows, kScalarType<Sum>)),
               weight = without_gaps(given_weight);
  const int64_t row = kConverts ? sizes.out : sizes.blocks * kUnit<Sum>;
  const Tensor result = new_tensor(rows, {lists.count, row}, given_rows.scalar_type());
  std::vector<Sum> bias(sizes.blocks * kUnit<Sum>);
  if (given_bias) {
    const Tensor numbers = without_gaps(in_dtype(*given_bias, kScalarType<Sum>));
    std::copy_n(numbers.template const_data_ptr<Sum>(), sizes.out, bias.begin());
  }
  const Sum* rows_data = rows.const_data_ptr<Sum>();
  const Element* weight_data = weight.const_data_ptr<Element>();
  Element* result_data = result.mutable_data_ptr<Element>();
  torch::stable::parallel_for(0, sizes.blocks, 1, [&](int64_t begin, int64_t end) {
    const auto matrix = scratch<Sum>(sizes.in * sizes.columns()),
               products = scratch<Sum>(sizes.rows * sizes.columns()),
               own = scratch<Sum>(kConverts ? lists.count * kUnit<Sum> : 0);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = sizes.first(block);
      vectorised<ToColumns<Sum, Element>>(sizes.channels(block), sizes.in * sizes.taps,
                                          weight_data + first * sizes.in * sizes.taps,
                                          matrix.get());
      in_vectors<MatrixProduct, Sum>(sizes.rows, sizes.in, sizes.taps,
                                     Strided<Sum>{rows_data, sizes.in, 1},
                                     static_cast<const Sum*>(matrix.get()), sizes.columns(),
                                     products.get(), sizes.columns(), false);
      const auto sum = [&](Sum* to, int64_t to_row) {
        in_vectors<SumListed, Sum>(int64_t{0}, lists.count, lists.offsets, lists.numbers,
                                   static_cast<const Sum*>(&bias[first]),
                                   static_cast<const Sum*>(products.get()), kUnit<Sum>, to, to_row);
      };
      if constexpr (kConverts) {
        sum(own.get(), kUnit<Sum>);
        vectorised<GiveUnit<Sum, Element>>(lists.count, sizes.channels(block),
                                           static_cast<const Sum*>(own.get()), result_data + first,
                                           row);
      } else {
        sum(result_data + first, row);
      }
    }
  });
  return without_filling(result, sizes.out);
}

// The gradients of the products of rows `first` to `last` − 1, [rows, taps, unit], from the
// gradient of one unit of channels, [windows, unit].
template <typename Sum>
void product_gradients(const Sizes<Sum>& sizes, const Lists& lists, const Sum* gradient,
                       int64_t first, int64_t last, Sum* products) {
  static constexpr Sum zeros[kUnit<Sum>] = {};
  in_vectors<SumListed, Sum>(first * sizes.taps, last * sizes.taps, lists.offsets, lists.numbers,
                             static_cast<const Sum*>(zeros), gradient, kUnit<Sum>, products,
                             kUnit<Sum>);
}

template <typename Sum, typename Element>
Tensor weight_gradient(const Tensor& given_gradient, const Tensor& given_rows, const Tensor& weight,
                       const Lists& lists) {
  constexpr int64_t kRows = 256;  // per step, so that their products' gradients stay in the cache
  const Sizes<Sum> sizes(weight, given_rows.size(0));
  const Tensor gradient = without_gaps(given_gradient),
               rows = without_gaps(in_dtype(given_rows, kScalarType<Sum>));
  const std::vector<int64_t> shape(weight.sizes().begin(), weight.sizes().end());
  const Tensor result = new_tensor(gradient, shape, gradient.scalar_type());
  const Element* gradient_data = gradient.const_data_ptr<Element>();
  const Sum* rows_data = rows.const_data_ptr<Sum>();
  Element* result_data = result.mutable_data_ptr<Element>();
  const int64_t windows = gradient.size(0);
  torch::stable::parallel_for(0, sizes.blocks, 1, [&](int64_t begin, int64_t end) {
    const auto own = scratch<Sum>(windows * kUnit<Sum>),
               products = scratch<Sum>(kRows * sizes.columns());
    const auto matrix = scratch<Sum>(sizes.in * sizes.columns());
    for (int64_t block = begin; block < end; ++block) {
      vectorised<TakeUnit<Sum, Element>>(windows, sizes.channels(block),
                                         gradient_data + sizes.first(block), sizes.out, own.get());
      std::fill_n(matrix.get(), sizes.in * sizes.columns(), Sum(0));
      for (int64_t first = 0; first < sizes.rows; first += kRows) {
        const int64_t last = std::min(first + kRows, sizes.rows);
        product_gradients<Sum>(sizes, lists, own.get(), first, last, products.get());
        in_vectors<MatrixProduct, Sum>(sizes.in, last - first, sizes.taps,
                                       Strided<Sum>{rows_data + first * sizes.in, 1, sizes.in},
                                       static_cast<const Sum*>(products.get()), sizes.columns(),
                                       matrix.get(), sizes.columns(), true);
      }
      vectorised<FromColumns<Sum, Element>>(
          sizes.channels(block), sizes.in * sizes.taps, static_cast<const Sum*>(matrix.get()),
          result_data + sizes.first(block) * sizes.in * sizes.taps);
    }
  });
  return result;
}

// The weight of one unit of output channels as [taps, unit, width], with zeros for missing
// channels.
template <typename Sum, typename Element>
void take_weight(const Sizes<Sum>& sizes, const Element* weight, int64_t block, int64_t width,
                 Sum* to) {
  std::fill_n(to, sizes.columns() * width, Sum(0));
  for (int64_t channel = 0; channel < sizes.channels(block); ++channel) {
    const Element* from = weight + (sizes.first(block) + channel) * sizes.in * sizes.taps;
    for (int64_t tap = 0; tap < sizes.taps; ++tap) {
      Sum* row = to + (tap * kUnit<Sum> + channel) * width;
      for (int64_t i = 0; i < sizes.in; ++i) row[i] = load(from[i * sizes.taps + tap]);
    }
  }
}

template <typename Sum, typename Element>
Tensor rows_gradient(const Tensor& given_gradient, const Tensor& given_weight, const Lists& lists) {
  // Per step, so that their products' gradients stay in the cache, as does a block's weight over
  // all steps of a thread.
  constexpr int64_t kRows = 32;
  Sizes<Sum> sizes(given_weight, 0);
  sizes.rows = lists.count / sizes.taps;
  const Tensor gradient = without_gaps(given_gradient), weight = without_gaps(given_weight);
  // A row of the weight takes an odd number of units, because rows at the distance of a power of
  // two share few sets of the cache: 128 input channels took 1.24 times as long (AVX2).
  const int64_t windows = gradient.size(0), width = units<Sum>(sizes.in) * kUnit<Sum>,
                weight_row = (units<Sum>(sizes.in) | 1) * kUnit<Sum>,
                block_size = sizes.columns() * weight_row;
  const Tensor result = torch::stable::new_zeros(gradient, {sizes.rows, width}, kScalarType<Sum>);
  const Element *gradient_data = gradient.const_data_ptr<Element>(),
                *weight_data = weight.const_data_ptr<Element>();
  Sum* result_data = result.mutable_data_ptr<Sum>();
  const auto gradients = scratch<Sum>(sizes.blocks * windows * kUnit<Sum>),
             weights = scratch<Sum>(sizes.blocks * block_size);
  torch::stable::parallel_for(0, sizes.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      vectorised<TakeUnit<Sum, Element>>(windows, sizes.channels(block),
                                         gradient_data + sizes.first(block), sizes.out,
                                         gradients.get() + block * windows * kUnit<Sum>);
      take_weight(sizes, weight_data, block, weight_row, weights.get() + block * block_size);
    }
  });
  torch::stable::parallel_for(0, sizes.rows, kRows, [&](int64_t begin, int64_t end) {
    const auto products = scratch<Sum>(kRows * sizes.columns());
    for (int64_t block = 0; block < sizes.blocks; ++block) {
      for (int64_t first = begin; first < end; first += kRows) {
        const int64_t last = std::min(first + kRows, end);
        product_gradients<Sum>(sizes, lists, gradients.get() + block * windows * kUnit<Sum>, first,
                               last, products.get());
        in_vectors<MatrixProduct, Sum>(last - first, sizes.columns(), width / kUnit<Sum>,
                                       Strided<Sum>{products.get(), sizes.columns(), 1},
                                       static_cast<const Sum*>(weights.get() + block * block_size),
                                       weight_row, result_data + first * width, width, true);
      }
    }
  });
  return in_dtype(without_filling(result, sizes.in), gradient.scalar_type());
}

// Calls f with a value of the accumulation type, and one of the elements' own type.
template <typename F>
void dispatch(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::BFloat16) return f(float(), BFloat16());
  if (dtype == ScalarType::Half) return f(float(), Half());
  if (dtype == ScalarType::Double) return f(double(), double());
  f(float(), float());
}

Tensor convolve_windows(const Tensor& rows, const Tensor& weight, std::optional<Tensor> bias,
                        const Tensor& offsets, const Tensor& numbers) {
  const int64_t taps = check_convolution(weight, offsets, numbers);
  const int64_t products =
      product(rows, "rows", {check_matrix(rows, "rows", weight, weight.size(1)), taps}, INT32_MAX);
  if (bias)
    check_operand(*bias, "bias", weight, {weight.scalar_type()},
                  std::vector<int64_t>{weight.size(0)}, "[out]");
  const Lists lists(offsets, numbers, products);
  std::optional<Tensor> result;
  dispatch(rows.scalar_type(), [&](auto sum, auto element) {
    result = convolve<decltype(sum), decltype(element)>(rows, weight, bias, lists);
  });
  return *result;
}

Tensor convolve_windows_weight(const Tensor& gradient, const Tensor& rows, const Tensor& weight,
                               const Tensor& offsets, const Tensor& numbers) {
  const int64_t count = check_back_convolution(weight, offsets, numbers);
  const Lists lists(offsets, numbers, check_matrix(gradient, "gradient", weight, weight.size(0)));
  check_operand(rows, "rows", weight, {weight.scalar_type()},
                std::vector<int64_t>{count, weight.size(1)}, "[rows, in]");
  std::optional<Tensor> result;
  dispatch(rows.scalar_type(), [&](auto sum, auto element) {
    result = weight_gradient<decltype(sum), decltype(element)>(gradient, rows, weight, lists);
  });
  return *result;
}

Tensor convolve_windows_rows(const Tensor& gradient, const Tensor& weight, const Tensor& offsets,
                             const Tensor& numbers) {
  check_back_convolution(weight, offsets, numbers);
  const Lists lists(offsets, numbers, check_matrix(gradient, "gradient", weight, weight.size(0)));
  std::optional<Tensor> result;
  dispatch(weight.scalar_type(), [&](auto sum, auto element) {
    result = rows_gradient<decltype(sum), decltype(element)>(gradient, weight, lists);
  });
  return *result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, library) {
  library.impl("convolve_windows", TORCH_BOX(&convolve_windows));
  library.impl("convolve_windows_weight", TORCH_BOX(&convolve_windows_weight));
  library.impl("convolve_windows_rows", TORCH_BOX(&convolve_windows_rows));
}

}  // namespace spade_fast
