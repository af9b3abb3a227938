// Products of small matrices that stay in the cache (matrix.cpp).
#pragma once

#include "vector.h"

namespace spade_fast {

// Element (i, j) of a matrix of `depth` columns is data[i · row + j · column].
template <typename Sum>
struct Strided {
  const Sum* data;
  int64_t row, column, depth;

  ALWAYS_INLINE void skip(int64_t rows) { data += rows * row; }
};

// The numbers of a matrix of at most kColumns columns that are not zero: row i has values[n] in
// column columns[n], for n from i · kColumns to i · kColumns + counts[i] − 1.
template <typename Sum>
struct Nonzeros {
  static constexpr int64_t kColumns = 64;

  const int32_t* counts;
  const uint8_t* columns;
  const Sum* values;

  ALWAYS_INLINE void skip(int64_t rows) {
    counts += rows;
    columns += rows * kColumns;
    values += rows * kColumns;
  }
};

// c = a·b; or every product is added to c in turn, so that several steps have the bits of one; or
// c += a·b, which rounds less over many steps.
enum class Update { replace, extend, add };

// Updates c of rows × units columns by a·b. The columns of b and c are contiguous; b_row and c_row
// are the distances between their rows.
template <typename Sum>
void multiply(int64_t rows, int64_t units, Strided<Sum> a, const Sum* b, int64_t b_row, Sum* c,
              int64_t c_row, Update update);
template <typename Sum>
void multiply(int64_t rows, int64_t units, Nonzeros<Sum> a, const Sum* b, int64_t b_row, Sum* c,
              int64_t c_row, Update update);

#if defined(__x86_64__)
// c = a·b, where the elements of a and b are pairs of bfloat16 in the place of a float, and their
// product is the sum of two products: for processors with AVX-512's products of bfloat16, twice as
// many per instruction.
void multiply_pairs(int64_t rows, int64_t units, Strided<float> a, const float* b, int64_t b_row,
                    float* c, int64_t c_row);
#endif

}  // namespace spade_fast
