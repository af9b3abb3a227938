// The gradient of the rows of a convolution at windows (convolve_windows.cpp), on the CPU.

#include "convolution.h"
#include "matrix.h"

namespace spade_fast {
namespace {

// x [rows, whole units] without the padding of its last unit.
Tensor without_filling(Tensor x, int64_t columns) {
  return x.size(1) == columns ? x : without_gaps(torch::stable::narrow(x, 1, 0, columns));
}

template <typename Sum>
struct Read {
  static ALWAYS_INLINE const Sum* run(Elements<Sum> row, int64_t count, Sum* buffer) {
    return row.read(count, buffer);
  }
};

// A channel's weight [in, taps], in whole units of `in`, as [taps, in]. Behind it, one more unit
// may be read.
template <typename Sum, int kBytes>
struct ByTaps : Vectors<Sum, kBytes> {
  using Vectors<Sum, kBytes>::at, Vectors<Sum, kBytes>::kOfUnit;

  static ALWAYS_INLINE void run(int64_t in_units, int64_t taps, const Sum* from, Sum* to,
                                int64_t to_tap) {
    for (int64_t i = 0; i < in_units * kUnit<Sum>; i += kUnit<Sum>) {
      for (int64_t first = 0; first < taps; first += kUnit<Sum>) {
        const Sum* found[kUnit<Sum>];
        for (int64_t k = 0; k < kUnit<Sum>; ++k) found[k] = from + (i + k) * taps + first;
        Sum square[kUnit<Sum> * kUnit<Sum>];
        Transpose<Sum, kBytes>::run(found, square, kUnit<Sum>);
        for (int64_t tap = first; tap < std::min(first + kUnit<Sum>, taps); ++tap) {
#pragma GCC unroll 4
          for (int v = 0; v < kOfUnit; ++v)
            at(to + tap * to_tap + i, v) = at(square + (tap - first) * kUnit<Sum>, v);
        }
      }
    }
  }
};

// The weight of one unit of output channels as [taps, unit, in], with zeros for missing channels.
// `to_row` is the distance between rows of `in` numbers, in whole units.
template <typename Sum>
void take_weight(const Sizes<Sum>& sizes, Matrix<const char> weight, const Unit& unit,
                 int64_t to_row, Sum* to) {
  const int64_t in_units = units<Sum>(sizes.in),
                size = in_units * kUnit<Sum> * sizes.taps + kUnit<Sum>;
  const auto own = scratch<Sum>(size);
  std::fill_n(own.get(), size, Sum(0));
  for (int64_t channel = 0; channel < kUnit<Sum>; ++channel) {
    if (channel < unit.channels) {
      const Elements<Sum> row = {weight.at(unit.first + channel, 0), weight.type};
      const Sum* found = vectorised<Read<Sum>>(row, weight.columns, own.get());
      if (found != own.get()) std::copy_n(found, weight.columns, own.get());
    } else if (channel == unit.channels) {
      std::fill_n(own.get(), size, Sum(0));
    }
    in_vectors<ByTaps, Sum>(in_units, sizes.taps, static_cast<const Sum*>(own.get()),
                            to + channel * to_row, kUnit<Sum> * to_row);
  }
}

template <typename Sum>
Tensor rows_gradient(const std::vector<Tensor>& given_gradients,
                     const std::vector<Tensor>& given_weights, const Lists& lists,
                     const Convolution& shape) {
  // Per step, so that their products' gradients stay in the cache, as does a unit's weight over
  // all steps of a thread.
  constexpr int64_t kRows = 32;
  const Sizes<Sum> sizes(shape, given_weights, lists.count / shape.taps);
  const std::vector<Tensor> all_gradients = all_without_gaps(given_gradients),
                            all_weights = all_without_gaps(given_weights);
  // A row of the weight takes an odd number of units, because rows at the distance of a power of
  // two share few sets of the cache: 128 input channels took 1.24 times as long (AVX2).
  const int64_t windows = all_gradients[0].size(0), width = units<Sum>(sizes.in) * kUnit<Sum>,
                weight_row = (units<Sum>(sizes.in) | 1) * kUnit<Sum>,
                weight_size = sizes.columns() * weight_row;
  const Tensor result =
      torch::stable::new_zeros(all_gradients[0], {sizes.rows, width}, kScalarType<Sum>);
  Sum* result_data = result.mutable_data_ptr<Sum>();
  const auto gradients = scratch<Sum>(sizes.count() * windows * kUnit<Sum>),
             weights = scratch<Sum>(sizes.count() * weight_size);
  torch::stable::parallel_for(0, sizes.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Unit& unit = sizes.units[i];
      const Tensor &gradient = all_gradients[unit.weight], &weight = all_weights[unit.weight];
      vectorised<TakeUnit<Sum>>(matrix_of(gradient, gradient.size(1)), windows, unit.first,
                                unit.channels, gradients.get() + i * windows * kUnit<Sum>);
      take_weight(sizes, matrix_of(weight, sizes.in * sizes.taps), unit, weight_row,
                  weights.get() + i * weight_size);
    }
  });
  torch::stable::parallel_for(0, sizes.rows, kRows, [&](int64_t begin, int64_t end) {
    const auto products = scratch<Sum>(kRows * sizes.columns());
    for (int64_t i = 0; i < sizes.count(); ++i) {
      for (int64_t first = begin; first < end; first += kRows) {
        const int64_t last = std::min(first + kRows, end);
        product_gradients<Sum>(sizes, lists, gradients.get() + i * windows * kUnit<Sum>, first,
                               last, products.get());
        multiply(last - first, width / kUnit<Sum>,
                 Strided<Sum>{products.get(), sizes.columns(), 1, sizes.columns()},
                 weights.get() + i * weight_size, weight_row, result_data + first * width, width,
                 Update::add);
      }
    }
  });
  return in_dtype(without_filling(result, sizes.in), all_gradients[0].scalar_type());
}

Tensor convolve_windows_rows(std::vector<Tensor> gradients, std::vector<Tensor> weights,
                             const Tensor& offsets, const Tensor& listed) {
  const Convolution shape = check_convolve_windows_rows(gradients, weights, offsets, listed);
  const Lists lists(offsets, listed, gradients[0].size(0));
  std::optional<Tensor> result;
  dispatch_sum(gradients[0].scalar_type(), [&](auto zero) {
    result = rows_gradient<decltype(zero)>(gradients, weights, lists, shape);
  });
  return *result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, library) {
  library.impl("convolve_windows_rows", TORCH_BOX(&convolve_windows_rows));
}

}  // namespace spade_fast
