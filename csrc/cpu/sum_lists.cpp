// The sums of listed rows of one unit of columns. Every sum is in the order of its list.

#include "convolution.h"

namespace spade_fast {
namespace {

template <typename Sum, int kBytes>
struct SumListed : Vectors<Sum, kBytes> {
  using typename Vectors<Sum, kBytes>::Vector;
  using Vectors<Sum, kBytes>::at, Vectors<Sum, kBytes>::kOfUnit;

  static ALWAYS_INLINE void run(int64_t first, int64_t last, const int32_t* offsets,
                                const int32_t* listed, const Sum* begin, const Sum* from, bool relu,
                                Sum* to, int64_t to_row) {
    for (int64_t i = first; i < last; ++i, to += to_row) {
      Vector sums[kOfUnit];
#pragma GCC unroll 4
      for (int v = 0; v < kOfUnit; ++v) sums[v] = at(begin, v);
      for (int32_t place = offsets[i]; place < offsets[i + 1]; ++place) {
        const Sum* row = from + listed[place] * kUnit<Sum>;
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

}  // namespace

template <typename Sum>
void sum_lists(const Lists& lists, int64_t first, int64_t last, const Sum* begin, const Sum* from,
               bool relu, Sum* to, int64_t to_row) {
  in_vectors<SumListed, Sum>(first, last, lists.offsets, lists.listed, begin, from, relu, to,
                             to_row);
}

template void sum_lists(const Lists&, int64_t, int64_t, const float*, const float*, bool, float*,
                        int64_t);
template void sum_lists(const Lists&, int64_t, int64_t, const double*, const double*, bool, double*,
                        int64_t);

}  // namespace spade_fast
