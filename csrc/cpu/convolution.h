// What a convolution at windows (convolve_windows.cpp) shares with its gradients: the lists of what
// each sum is over, the sizes, and units of channels.
//
// A unit is 64 bytes of output channels. One thread computes all products of a unit, which stay in
// its cache, and sums them there.
#pragma once

#include <memory>
#include <new>
#include <vector>

#include "tensors.h"

namespace spade_fast {

// Sum i is over the entries listed[offsets[i]] to listed[offsets[i + 1] − 1].
struct Lists {
  Tensor offsets_owner, listed_owner;
  const int32_t *offsets, *listed;
  int64_t count;

  // Refuses invalid offsets, and entries that are not below `bound`.
  Lists(const Tensor& given_offsets, const Tensor& given_listed, int64_t bound)
      : offsets_owner(without_gaps(given_offsets)),
        listed_owner(without_gaps(given_listed)),
        offsets(offsets_owner.const_data_ptr<int32_t>()),
        listed(listed_owner.const_data_ptr<int32_t>()),
        count(given_offsets.numel() - 1) {
    STD_TORCH_CHECK(offsets[0] == 0 && !vectorised<EverFalls>(count + 1, offsets) &&
                        offsets[count] == listed_owner.numel(),
                    "spade_fast: offsets has numbers from ", offsets[0], " to ", offsets[count],
                    "; they should begin at 0, never decrease, and end at ", listed_owner.numel(),
                    ", the length of the list");
    check_range(listed_owner, "listed", bound);
  }
};

// sum_lists.cpp: one unit of columns of sums `first` to `last` − 1 of the rows of `from`
// [rows, unit]. Sum i starts from `begin` and is stored at row i − first of `to`, behind a ReLU if
// there is one.
template <typename Sum>
void sum_lists(const Lists& lists, int64_t first, int64_t last, const Sum* begin, const Sum* from,
               bool relu, Sum* to, int64_t to_row);

// Memory in which no unit is in two lines of the cache: with half of each unit in either, every
// load would take two.
struct Free {
  void operator()(void* memory) const { ::operator delete[](memory, kLine); }
  static constexpr std::align_val_t kLine{64};
};

template <typename Number>
std::unique_ptr<Number[], Free> scratch(int64_t size) {
  return std::unique_ptr<Number[], Free>(
      static_cast<Number*>(::operator new[](size * sizeof(Number), Free::kLine)));
}

// A unit of a weight's output channels. A weight's last unit may have fewer channels.
struct Unit {
  size_t weight;            // the number of the weight
  int64_t first, channels;  // its channels
  int64_t column;           // the first one's, in the results of all weights
};

// The sizes of several convolutions of the same rows.
template <typename Sum>
struct Sizes {
  int64_t rows, in, taps;
  std::vector<Unit> units;

  Sizes(const Convolution& shape, const std::vector<Tensor>& weights, int64_t rows)
      : rows(rows), in(shape.channels), taps(shape.taps) {
    int64_t column = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      const int64_t out = weights[i].size(0);
      for (int64_t first = 0; first < out; first += kUnit<Sum>)
        units.push_back({i, first, std::min(kUnit<Sum>, out - first), column + first});
      column += out;
    }
  }

  int64_t count() const { return units.size(); }
  int64_t columns() const { return taps * kUnit<Sum>; }
  int64_t matrix() const { return spade_fast::units<Sum>(in * taps) * kUnit<Sum> * kUnit<Sum>; }
};

// A dense matrix of any dtype. Byte is `const char` or `char`.
template <typename Byte>
struct Matrix {
  Byte* data;
  int64_t columns, size;  // of an element
  ScalarType type;

  ALWAYS_INLINE Byte* at(int64_t row, int64_t column) const {
    return data + (row * columns + column) * size;
  }
};

inline Matrix<const char> matrix_of(const Tensor& x, int64_t columns) {
  return {static_cast<const char*>(x.const_data_ptr()), columns,
          static_cast<int64_t>(x.element_size()), x.scalar_type()};
}

inline Matrix<char> output_matrix(const Tensor& x, int64_t columns) {
  return {static_cast<char*>(x.mutable_data_ptr()), columns, static_cast<int64_t>(x.element_size()),
          x.scalar_type()};
}

inline std::vector<Tensor> all_without_gaps(std::vector<Tensor> tensors) {
  for (Tensor& tensor : tensors) tensor = without_gaps(tensor);
  return tensors;
}

// Copies one unit of columns from `first` on, of which `columns` exist, to [rows, unit] with zeros
// for the missing columns.
template <typename Sum>
struct TakeUnit {
  static ALWAYS_INLINE void run(Matrix<const char> from, int64_t rows, int64_t first,
                                int64_t columns, Sum* to) {
    for (int64_t row = 0; row < rows; ++row, to += kUnit<Sum>) {
      Sum buffer[kUnit<Sum>];
      const Sum* found = Elements<Sum>{from.at(row, first), from.type}.read(columns, buffer);
#pragma omp simd
      for (int64_t c = 0; c < kUnit<Sum>; ++c) to[c] = c < columns ? found[c] : 0;
    }
  }
};

// The gradients of the products of rows `first` to `last` − 1, [rows, taps, unit], from the
// gradient of one unit of channels, [windows, unit].
template <typename Sum>
void product_gradients(const Sizes<Sum>& sizes, const Lists& lists, const Sum* gradient,
                       int64_t first, int64_t last, Sum* products) {
  static constexpr Sum zeros[kUnit<Sum>] = {};
  sum_lists(lists, first * sizes.taps, last * sizes.taps, zeros, gradient, false, products,
            kUnit<Sum>);
}

}  // namespace spade_fast
