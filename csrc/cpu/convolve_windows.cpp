// Convolutions of the same rows at the distinct windows of a map alone, on the CPU, and the
// gradients of their weights and rows.
//
// Result i is bias + Σ weight[:, :, t] · rows[r] over the pairs (r, t) that window i sees: row r at
// tap t. The results of all weights lie side by side. A thread computes all products
// weight[:, :, t] · rows[r] of one unit of a weight's output channels (64 bytes), which stay in its
// cache, and sums them there for every window. Products with numbers of rows that are zero are left
// out where that takes less time. Every sum is in a fixed order, whatever the number of threads.
// Elements of other dtypes than Sum are converted where a unit is read or written. `windows.Sums`
// has the lists: the entries r · taps + t of each window, and the windows of each (r, t).

#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "matrix.h"
#include "tensors.h"

namespace spade_fast {
namespace {

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

// One unit of columns of sums `first` to `last` − 1. Sum i starts from `begin` and is stored at row
// i − first of `to`, behind a ReLU if there is one.
template <typename Sum, int kBytes>
struct SumListed : Vectors<Sum, kBytes> {
  using typename Vectors<Sum, kBytes>::Vector;
  using Vectors<Sum, kBytes>::at, Vectors<Sum, kBytes>::kOfUnit;

  static ALWAYS_INLINE void run(int64_t first, int64_t last, const int32_t* offsets,
                                const int32_t* listed, const Sum* begin, const Sum* from,
                                int64_t from_row, bool relu, Sum* to, int64_t to_row) {
    for (int64_t i = first; i < last; ++i, to += to_row) {
      Vector sums[kOfUnit];
#pragma GCC unroll 4
      for (int v = 0; v < kOfUnit; ++v) sums[v] = at(begin, v);
      for (int32_t place = offsets[i]; place < offsets[i + 1]; ++place) {
        const Sum* row = from + listed[place] * from_row;
#pragma GCC unroll 4
        for (int v = 0; v < kOfUnit; ++v) sums[v] += at(row, v);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kOfUnit; ++v) {
        if (relu) sums[v] = sums[v] < 0 ? Vector{} : sums[v];  // NaN stays
        at(to, v) = sums[v];
      }
    }
  }
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

Matrix<const char> matrix_of(const Tensor& x, int64_t columns) {
  return {static_cast<const char*>(x.const_data_ptr()), columns,
          static_cast<int64_t>(x.element_size()), x.scalar_type()};
}

Matrix<char> output_matrix(const Tensor& x, int64_t columns) {
  return {static_cast<char*>(x.mutable_data_ptr()), columns, static_cast<int64_t>(x.element_size()),
          x.scalar_type()};
}

// Transposes one unit of rows from `first` on, of which `rows` exist, to [columns, unit] with zeros
// for the missing rows; and back. The columns are filled up to whole units.
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

// Copies one unit of columns from `first` on, of which `columns` exist, to [rows, unit] with zeros
// for the missing columns; and back.
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

std::vector<Tensor> all_without_gaps(std::vector<Tensor> tensors) {
  for (Tensor& tensor : tensors) tensor = without_gaps(tensor);
  return tensors;
}

// x [rows, whole units] without the padding of its last unit.
Tensor without_filling(Tensor x, int64_t columns) {
  return x.size(1) == columns ? x : without_gaps(torch::stable::narrow(x, 1, 0, columns));
}

template <typename Sum>
constexpr Sum kLargest = std::numeric_limits<Sum>::max();

template <typename Sum>
struct CountNonzeros {
  static ALWAYS_INLINE int64_t run(int64_t count, const Sum* x) {
    int64_t nonzeros = 0;
#pragma omp simd reduction(+ : nonzeros)
    for (int64_t i = 0; i < count; ++i) nonzeros += x[i] != 0;
    return nonzeros;
  }
};

// Whether all numbers are from −bound to bound. NaN is not.
template <typename Sum>
struct AllWithin {
  static ALWAYS_INLINE bool run(int64_t count, const Sum* x, Sum bound) {
    int64_t beyond = 0;
#pragma omp simd reduction(+ : beyond)
    for (int64_t i = 0; i < count; ++i) beyond += !(x[i] <= bound && x[i] >= -bound);
    return beyond == 0;
  }
};

template <typename Sum>
using Bits = std::conditional_t<sizeof(Sum) == 8, uint64_t, uint32_t>;

// Lists `first` to `last` − 1 of NonzeroLists.
template <typename Sum>
struct ListNonzeros {
  static ALWAYS_INLINE void run(int64_t first, int64_t last, int64_t rows, Strided<Sum> a,
                                int32_t* counts, uint8_t* columns, Sum* values) {
    constexpr int64_t kColumns = Nonzeros<Sum>::kColumns;
    for (int64_t list = first; list < last; ++list) {
      const int64_t start = list / rows * kColumns, width = std::min(kColumns, a.depth - start);
      const Sum* from = a.data + list % rows * a.row + start * a.column;
      uint8_t* own_columns = columns + list * kColumns;
      Sum* own_values = values + list * kColumns;
      int64_t count = 0;
      for (int64_t k = 0; k < width; ++k) {
        const Sum value = from[k * a.column];
        own_columns[count] = k;
        own_values[count] = value;
        // Without a branch, because nobody could predict it; as bits, because comparing floats
        // takes longer.
        count += bit_cast<Bits<Sum>>(value) << 1 != 0;
      }
      counts[list] = count;
    }
  }
};

// The numbers of a matrix that are not zero. Behind a ReLU half of them are zero, and products with
// the others alone were 1.28 (AVX-512) and 1.43 (AVX2) times as fast. They are the same to the last
// bit, because adding 0 · b changes no sum, unless b is infinite or NaN.
template <typename Sum>
class NonzeroLists {
 public:
  static constexpr int64_t kColumns = Nonzeros<Sum>::kColumns;

  // `x` has all numbers of `a`, a matrix of this many rows.
  NonzeroLists(const Tensor& x, int64_t taps, int64_t rows, Strided<Sum> a) : rows_(rows) {
    const int64_t steps = (a.depth + kColumns - 1) / kColumns, lists = steps * rows;
    if (taps < kTaps || vectorised<CountNonzeros<Sum>>(x.numel(), a.data) >= kShare * x.numel())
      return;
    counts_ = scratch<int32_t>(lists);
    columns_ = scratch<uint8_t>(lists * kColumns);
    values_ = scratch<Sum>(lists * kColumns);
    torch::stable::parallel_for(0, lists, 256, [&](int64_t begin, int64_t end) {
      vectorised<ListNonzeros<Sum>>(begin, end, rows, a, counts_.get(), columns_.get(),
                                    values_.get());
    });
  }

  // Whether there are lists, because they pay.
  explicit operator bool() const { return counts_ != nullptr; }

  // The columns from step · kColumns on.
  Nonzeros<Sum> at(int64_t step) const {
    Nonzeros<Sum> lists{counts_.get(), columns_.get(), values_.get()};
    lists.skip(step * rows_);
    return lists;
  }

 private:
  // A convolution with fewer taps has too few sums at a time for the latency of their instruction.
  static constexpr int64_t kTaps = 9;
  // Products take equally long, lists not counted, if 0.67 (AVX-512) or 0.74 (AVX2) are not zero.
  static constexpr double kShare = 0.6;

  int64_t rows_;
  std::unique_ptr<int32_t[], Free> counts_;
  std::unique_ptr<uint8_t[], Free> columns_;
  std::unique_ptr<Sum[], Free> values_;
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
        run_avx512<PairProduct>(sizes_.rows, sizes_.taps, factors(), weights, columns, products,
                                columns, Update::replace);
        return;
      }
    }
#endif
    if (!*nonzeros_ || !vectorised<AllWithin<Sum>>(sizes_.in * columns, weights, kLargest<Sum>)) {
      in_vectors<MatrixProduct, Sum>(sizes_.rows, sizes_.taps, factors(), weights, columns,
                                     products, columns, Update::replace);
      return;
    }
    constexpr int64_t kStep = NonzeroLists<Sum>::kColumns;
    for (int64_t step = 0; step * kStep < sizes_.in; ++step)
      in_vectors<NonzeroProduct, Sum>(sizes_.rows, sizes_.taps, nonzeros_->at(step),
                                      weights + step * kStep * columns, columns, products, columns,
                                      step == 0 ? Update::replace : Update::extend);
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
      in_vectors<SumListed, Sum>(
          int64_t{0}, lists.count, lists.offsets, lists.listed,
          static_cast<const Sum*>(&bias[i * kUnit<Sum>]), static_cast<const Sum*>(products.get()),
          kUnit<Sum>, relu,
          directly ? reinterpret_cast<Sum*>(target.at(0, unit.column)) : sums.get(),
          directly ? shape.outputs : kUnit<Sum>);
      if (!directly)
        vectorised<GiveUnit<Sum>>(static_cast<const Sum*>(sums.get()), lists.count, target,
                                  unit.column, unit.channels);
    }
  });
  return result;
}

// The gradients of the products of rows `first` to `last` − 1, [rows, taps, unit], from the
// gradient of one unit of channels, [windows, unit].
template <typename Sum>
void product_gradients(const Sizes<Sum>& sizes, const Lists& lists, const Sum* gradient,
                       int64_t first, int64_t last, Sum* products) {
  static constexpr Sum zeros[kUnit<Sum>] = {};
  in_vectors<SumListed, Sum>(first * sizes.taps, last * sizes.taps, lists.offsets, lists.listed,
                             static_cast<const Sum*>(zeros), gradient, kUnit<Sum>, false, products,
                             kUnit<Sum>);
}

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
        const Sum* of_products = products.get();
        if (skips) {
          in_vectors<NonzeroProduct, Sum>(sizes.in, sizes.taps, nonzeros.at(first / kStep),
                                          of_products, sizes.columns(), matrix.get(),
                                          sizes.columns(), Update::add);
          continue;
        }
        const Strided<Sum> own_factors = {factors.data + first * sizes.in, 1, sizes.in,
                                          last - first};
        in_vectors<MatrixProduct, Sum>(sizes.in, sizes.taps, own_factors, of_products,
                                       sizes.columns(), matrix.get(), sizes.columns(), Update::add);
      }
      in_vectors<FromColumns, Sum>(static_cast<const Sum*>(matrix.get()),
                                   output_matrix(result, sizes.in * sizes.taps), unit.first,
                                   unit.channels);
    }
  });
  return results;
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
        in_vectors<MatrixProduct, Sum>(
            last - first, width / kUnit<Sum>,
            Strided<Sum>{products.get(), sizes.columns(), 1, sizes.columns()},
            static_cast<const Sum*>(weights.get() + i * weight_size), weight_row,
            result_data + first * width, width, Update::add);
      }
    }
  });
  return in_dtype(without_filling(result, sizes.in), all_gradients[0].scalar_type());
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
  library.impl("convolve_windows", TORCH_BOX(&convolve_windows));
  library.impl("convolve_windows_rows", TORCH_BOX(&convolve_windows_rows));
  library.impl("convolve_windows_weights", TORCH_BOX(&convolve_windows_weights));
}

}  // namespace spade_fast
