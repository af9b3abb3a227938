// Products of small matrices that stay in the cache, with vectors as wide as the instruction set in
// use allows.
#pragma once

#include <algorithm>

#include "vector.h"

namespace spade_fast {

// Columns are counted in units of 64 bytes, a multiple of every instruction set's vector.
template <typename Sum>
constexpr int64_t kUnit = 64 / sizeof(Sum);

template <typename Sum>
constexpr int64_t units(int64_t columns) {
  return (columns + kUnit<Sum> - 1) / kUnit<Sum>;
}

// A vector of kBytes without alignment; at(data, v) is vector number v from data on.
template <typename Sum, int kBytes>
struct Vectors {
  typedef Sum Vector __attribute__((vector_size(kBytes), aligned(alignof(Sum)), may_alias));
  static constexpr int kOfUnit = 64 / kBytes;

  static ALWAYS_INLINE Vector& at(Sum* data, int64_t v) {
    return reinterpret_cast<Vector*>(data)[v];
  }
  static ALWAYS_INLINE const Vector& at(const Sum* data, int64_t v) {
    return reinterpret_cast<const Vector*>(data)[v];
  }
};

// Calls Kernel<Sum, kBytes>::run(arguments…) with the vector width of the instruction set in use.
template <template <typename, int> class Kernel, typename Sum, typename... Arguments>
void in_vectors(Arguments... arguments) {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::avx512) return run_avx512<Kernel<Sum, 64>>(arguments...);
  if (instruction_set() == InstructionSet::avx2) return run_avx2<Kernel<Sum, 32>>(arguments...);
#endif
  run_base<Kernel<Sum, 16>>(arguments...);
}

// Element (i, j) of a matrix is data[i · row + j · column].
template <typename Sum>
struct Strided {
  const Sum* data;
  int64_t row, column;
};

// c = a·b, or c += a·b if `accumulate`, with c of rows × units columns and a of `depth` columns.
// The columns of b and c are contiguous; b_row and c_row are the distances between their rows.
//
// Each tile of c, kRows × kUnits, is accumulated in registers. Its size is the largest that the
// registers of the instruction set allow.
template <typename Sum, int kBytes, int kRows, int kUnits>
struct Tiles : Vectors<Sum, kBytes> {
  using typename Vectors<Sum, kBytes>::Vector;
  using Vectors<Sum, kBytes>::at;
  static constexpr int kVectors = kUnits * Vectors<Sum, kBytes>::kOfUnit;

  static ALWAYS_INLINE void run(int64_t rows, int64_t depth, int64_t units, Strided<Sum> a,
                                const Sum* b, int64_t b_row, Sum* c, int64_t c_row,
                                bool accumulate) {
    for (; units >= kUnits; units -= kUnits, b += kUnits * kUnit<Sum>, c += kUnits * kUnit<Sum>) {
      run_rows(rows, depth, a, b, b_row, c, c_row, accumulate);
    }
    if constexpr (kUnits > 1)
      Tiles<Sum, kBytes, kRows, kUnits - 1>::run(rows, depth, units, a, b, b_row, c, c_row,
                                                 accumulate);
  }

  static ALWAYS_INLINE void run_rows(int64_t rows, int64_t depth, Strided<Sum> a, const Sum* b,
                                     int64_t b_row, Sum* c, int64_t c_row, bool accumulate) {
    for (; rows >= kRows; rows -= kRows, a.data += kRows * a.row, c += kRows * c_row)
      run_tile(depth, a, b, b_row, c, c_row, accumulate);
    if constexpr (kRows > 1)
      Tiles<Sum, kBytes, kRows / 2, kUnits>::run_rows(rows, depth, a, b, b_row, c, c_row,
                                                      accumulate);
  }

  static ALWAYS_INLINE void run_tile(int64_t depth, Strided<Sum> a, const Sum* b, int64_t b_row,
                                     Sum* c, int64_t c_row, bool accumulate) {
    Vector sums[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] = accumulate ? at(c + i * c_row, v) : Vector{};
    }
    for (int64_t k = 0; k < depth; ++k) {
      Vector factors[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) factors[v] = at(b + k * b_row, v);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Sum factor = a.data[i * a.row + k * a.column];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[i][v] += factor * factors[v];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) at(c + i * c_row, v) = sums[i][v];
    }
  }
};

template <typename Sum, int kBytes>
struct MatrixProduct : Tiles<Sum, kBytes,
                             kBytes == 64   ? 8
                             : kBytes == 32 ? 6
                                            : 2,
                             kBytes == 64 ? 3 : 1> {};

}  // namespace spade_fast
