// Lists of the numbers of a matrix that are not zero, for products with these alone.
#pragma once

#include <limits>
#include <memory>
#include <type_traits>

#include "convolution.h"
#include "matrix.h"

namespace spade_fast {

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

// The lists of a matrix. Behind a ReLU half of its numbers are zero, and products with the others
// alone were 1.28 (AVX-512) and 1.43 (AVX2) times as fast. They are the same to the last bit,
// because adding 0 · b changes no sum, unless b is infinite or NaN.
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

}  // namespace spade_fast
