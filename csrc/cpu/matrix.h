// Products of small matrices that stay in the cache, with vectors as wide as the instruction set in
// use allows.
#pragma once

#include "vector.h"

namespace spade_fast {

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
// registers of the instruction set allow. With kPairs, the elements of a and b are pairs of
// bfloat16 in the place of a float, and their product is the sum of two products.
template <typename Sum, int kBytes, int kRows, int kUnits, bool kPairs = false>
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
      Tiles<Sum, kBytes, kRows, kUnits - 1, kPairs>::run(rows, depth, units, a, b, b_row, c, c_row,
                                                         accumulate);
  }

  static ALWAYS_INLINE void run_rows(int64_t rows, int64_t depth, Strided<Sum> a, const Sum* b,
                                     int64_t b_row, Sum* c, int64_t c_row, bool accumulate) {
    for (; rows >= kRows; rows -= kRows, a.data += kRows * a.row, c += kRows * c_row)
      run_tile(depth, a, b, b_row, c, c_row, accumulate);
    if constexpr (kRows > 1)
      Tiles<Sum, kBytes, kRows / 2, kUnits, kPairs>::run_rows(rows, depth, a, b, b_row, c, c_row,
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
        const Sum& factor = a.data[i * a.row + k * a.column];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) multiply_add(factor, factors[v], sums[i][v]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) at(c + i * c_row, v) = sums[i][v];
    }
  }

 private:
  static ALWAYS_INLINE void multiply_add(const Sum& factor, Vector factors, Vector& sum) {
#if defined(__x86_64__)
    if constexpr (kPairs) {
      // In assembly, because the compiler has this instruction only where everything may use it.
      typedef int32_t Words __attribute__((vector_size(kBytes)));
      const Words factor_everywhere = Words{} + bit_cast<int32_t>(factor);
      asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(factors), "v"(factor_everywhere));
      return;
    }
#endif
    sum += factor * factors;
  }
};

// The same with a and b in pairs, for processors with AVX-512's products of bfloat16: twice as many
// per instruction.
struct PairProduct : Tiles<float, 64, 8, 3, true> {};

template <typename Sum, int kBytes>
struct MatrixProduct : Tiles<Sum, kBytes,
                             kBytes == 64   ? 8
                             : kBytes == 32 ? 6
                                            : 2,
                             kBytes == 64 ? 3 : 1> {};

}  // namespace spade_fast
