// Products of small matrices that stay in the cache, with vectors as wide as the instruction set in
// use allows.

#include "matrix.h"

namespace spade_fast {
namespace {

// Each tile of c, kRows × kVectors, is accumulated in registers. With kPairs, the elements of a and
// b are pairs of bfloat16.
template <typename Sum, int kBytes, int kRows, int kVectors, bool kPairs = false>
struct Tiles : Vectors<Sum, kBytes> {
  using typename Vectors<Sum, kBytes>::Vector;
  using Vectors<Sum, kBytes>::at, Vectors<Sum, kBytes>::kOfUnit;

  template <typename Factors>
  static ALWAYS_INLINE void run(int64_t rows, int64_t units, Factors a, const Sum* b, int64_t b_row,
                                Sum* c, int64_t c_row, Update update) {
    run_columns(rows, units * kOfUnit, a, b, b_row, c, c_row, update);
  }

  template <typename Factors>
  static ALWAYS_INLINE void run_columns(int64_t rows, int64_t vectors, Factors a, const Sum* b,
                                        int64_t b_row, Sum* c, int64_t c_row, Update update) {
    constexpr int64_t kColumns = kVectors * kUnit<Sum> / kOfUnit;
    for (; vectors >= kVectors; vectors -= kVectors, b += kColumns, c += kColumns)
      run_rows(rows, a, b, b_row, c, c_row, update);
    if constexpr (kVectors > 1)
      Tiles<Sum, kBytes, kRows, kVectors - 1, kPairs>::run_columns(rows, vectors, a, b, b_row, c,
                                                                   c_row, update);
  }

  template <typename Factors>
  static ALWAYS_INLINE void run_rows(int64_t rows, Factors a, const Sum* b, int64_t b_row, Sum* c,
                                     int64_t c_row, Update update) {
    for (; rows >= kRows; rows -= kRows, a.skip(kRows), c += kRows * c_row)
      run_tile(a, b, b_row, c, c_row, update);
    if constexpr (kRows > 1)
      Tiles<Sum, kBytes, kRows / 2, kVectors, kPairs>::run_rows(rows, a, b, b_row, c, c_row,
                                                                update);
  }

 private:
  template <typename Factors>
  static ALWAYS_INLINE void run_tile(Factors a, const Sum* b, int64_t b_row, Sum* c, int64_t c_row,
                                     Update update) {
    Vector sums[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 9
      for (int v = 0; v < kVectors; ++v)
        sums[i][v] = update == Update::extend ? at(c + i * c_row, v) : Vector{};
    }
    add_products(a, b, b_row, sums);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 9
      for (int v = 0; v < kVectors; ++v) {
        if (update == Update::add) sums[i][v] += at(c + i * c_row, v);
        at(c + i * c_row, v) = sums[i][v];
      }
    }
  }

  static ALWAYS_INLINE void add_products(Strided<Sum> a, const Sum* b, int64_t b_row,
                                         Vector (&sums)[kRows][kVectors]) {
    for (int64_t k = 0; k < a.depth; ++k) {
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
  }

  // Two rows take turns, because the sums of one may be too few for the latency of their
  // instruction.
  static ALWAYS_INLINE void add_products(Nonzeros<Sum> a, const Sum* b, int64_t b_row,
                                         Vector (&sums)[kRows][kVectors]) {
    int64_t common = a.counts[0];
#pragma GCC unroll 8
    for (int i = 1; i < kRows; ++i) common = a.counts[i] < common ? a.counts[i] : common;
    for (int64_t n = 0; n < common; ++n) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) add_product(a, i, n, b, b_row, sums[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      for (int64_t n = common; n < a.counts[i]; ++n) add_product(a, i, n, b, b_row, sums[i]);
    }
  }

  static ALWAYS_INLINE void add_product(Nonzeros<Sum> a, int64_t row, int64_t n, const Sum* b,
                                        int64_t b_row, Vector (&sums)[kVectors]) {
    const int64_t place = row * a.kColumns + n;
    const Sum *factors = b + a.columns[place] * b_row, factor = a.values[place];
#pragma GCC unroll 9
    for (int v = 0; v < kVectors; ++v) sums[v] += factor * at(factors, v);
  }

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

// The tile is the largest that the registers of the instruction set allow.
template <typename Sum, int kBytes>
struct MatrixProduct : Tiles<Sum, kBytes,
                             kBytes == 64   ? 8
                             : kBytes == 32 ? 6
                                            : 2,
                             kBytes == 64   ? 3
                             : kBytes == 32 ? 2
                                            : 4> {};

// For Nonzeros. Every product loads its part of b, and these loads take the time: the more vectors
// share the load of a number, the better. They come from the L1 cache, because kColumns rows of
// 9 vectors of AVX-512 have 36 KB. With 16 registers (AVX2) one row at a time was 1.01 to 1.10
// times as fast as two with 6 vectors, of which one has a longer list.
template <typename Sum, int kBytes>
struct NonzeroProduct : Tiles<Sum, kBytes, kBytes == 32 ? 1 : 2, kBytes == 16 ? 4 : 9> {};

}  // namespace

template <typename Sum>
void multiply(int64_t rows, int64_t units, Strided<Sum> a, const Sum* b, int64_t b_row, Sum* c,
              int64_t c_row, Update update) {
  in_vectors<MatrixProduct, Sum>(rows, units, a, b, b_row, c, c_row, update);
}

template <typename Sum>
void multiply(int64_t rows, int64_t units, Nonzeros<Sum> a, const Sum* b, int64_t b_row, Sum* c,
              int64_t c_row, Update update) {
  in_vectors<NonzeroProduct, Sum>(rows, units, a, b, b_row, c, c_row, update);
}

template void multiply(int64_t, int64_t, Strided<float>, const float*, int64_t, float*, int64_t,
                       Update);
template void multiply(int64_t, int64_t, Strided<double>, const double*, int64_t, double*, int64_t,
                       Update);
template void multiply(int64_t, int64_t, Nonzeros<float>, const float*, int64_t, float*, int64_t,
                       Update);
template void multiply(int64_t, int64_t, Nonzeros<double>, const double*, int64_t, double*, int64_t,
                       Update);

#if defined(__x86_64__)
void multiply_pairs(int64_t rows, int64_t units, Strided<float> a, const float* b, int64_t b_row,
                    float* c, int64_t c_row) {
  run_avx512<Tiles<float, 64, 8, 3, true>>(rows, units, a, b, b_row, c, c_row, Update::replace);
}
#endif

}  // namespace spade_fast
