// Tables read by pixel for operands stored by channel: tiles of kUnit channels and kTile pixels,
// transposed in registers.
#pragma once

#include <utility>

#include "vector.h"

namespace spade_fast {

// A tile stays in the L2 cache, and is wide enough that a task reads several KiB of a plane before
// it turns to the next.
constexpr int64_t kTile = 1024;

// The distance between the channels of a tile. If it were a power of two, they would all compete
// for a few places in the L1 cache.
template <typename Sum>
constexpr int64_t kTileRow = kTile + kUnit<Sum>;

// The rows [K, C] of a table, and which of them each pixel of an image has.
template <typename Sum>
struct Table {
  const Sum* rows;
  int64_t row;  // the distance between rows
  const int32_t* index;

  ALWAYS_INLINE const Sum* at(int64_t pixel) const { return rows + index[pixel] * row; }
};

// Transposes kUnit × kUnit elements, in squares of vectors that fit the registers.
template <typename Sum, int kBytes>
struct Transpose : Vectors<Sum, kBytes> {
  using typename Vectors<Sum, kBytes>::Vector;
  using Vectors<Sum, kBytes>::at;
  static constexpr int kLength = kBytes / sizeof(Sum), kLane = 16 / sizeof(Sum);

  // Row i is at from[i]; column i is stored at to + i·distance, after the rows of its square have
  // been read.
  static ALWAYS_INLINE void run(const Sum* const* from, Sum* to, int64_t distance) {
    for (int64_t i = 0; i < kUnit<Sum>; i += kLength) {
      for (int64_t j = 0; j < kUnit<Sum>; j += kLength) {
        Vector square[kLength];
#pragma GCC unroll 16
        for (int k = 0; k < kLength; ++k) square[k] = at(from[i + k] + j, 0);
        transpose<kLength / 2>(square);
#pragma GCC unroll 16
        for (int k = 0; k < kLength; ++k) at(to + (j + k) * distance + i, 0) = square[k];
      }
    }
  }

 private:
  // Exchanges elements between the rows that are kDistance apart, then half of that, and so on.
  template <int kDistance>
  static ALWAYS_INLINE void transpose(Vector* rows) {
#pragma GCC unroll 16
    for (int i = 0; i < kLength; ++i) {
      if ((i & kDistance) == 0)
        exchange<kDistance>(rows[i], rows[i + kDistance],
                            std::make_integer_sequence<int, kLength>());
    }
    if constexpr (kDistance > 1) transpose<kDistance / 2>(rows);
  }

  template <int kDistance, int... kPlaces>
  static ALWAYS_INLINE void exchange(Vector& a, Vector& b, std::integer_sequence<int, kPlaces...>) {
    const Vector before = a;
    a = __builtin_shufflevector(before, b, source(kPlaces, kDistance, false)...);
    b = __builtin_shufflevector(before, b, source(kPlaces, kDistance, true)...);
  }

  // The place in a‖b of element i of the low or the high half. Within lanes of 16 bytes the halves
  // interleave a and b, because x86 has instructions for that.
  static constexpr int source(int i, int distance, bool high) {
    if (distance < kLane)
      return i / kLane * kLane + i % kLane / 2 + high * kLane / 2 + i % 2 * kLength;
    return (i & distance) == 0 ? i + high * distance : i + kLength - !high * distance;
  }
};

// Fills a tile with `channels` ≤ kUnit entries of the rows of `pixels` ≤ kTile pixels from `start`
// on. What follows them, up to a multiple of kUnit pixels, is undefined.
template <typename Sum, int kBytes>
struct LookUp {
  static ALWAYS_INLINE void run(Table<Sum> table, int64_t start, int64_t pixels, int64_t channels,
                                Sum* tile) {
    if (channels < kUnit<Sum>) {
      for (int64_t c = 0; c < channels; ++c) {
#pragma omp simd
        for (int64_t p = 0; p < pixels; ++p) tile[c * kTileRow<Sum> + p] = table.at(start + p)[c];
      }
      return;
    }
    for (int64_t p = 0; p < pixels; p += kUnit<Sum>) {
      const int32_t* places = table.index + start + p;
      int32_t last[kUnit<Sum>];
      if (p + kUnit<Sum> > pixels) {
        for (int64_t i = 0; i < kUnit<Sum>; ++i) last[i] = places[i < pixels - p ? i : 0];
        places = last;
      }
      // The processor does not foresee which rows follow.
      for (int64_t i = 4 * kUnit<Sum>; i < 5 * kUnit<Sum> && p + i < pixels; ++i)
        __builtin_prefetch(table.rows + places[i] * table.row);
      const Sum* rows[kUnit<Sum>];
      for (int64_t i = 0; i < kUnit<Sum>; ++i) rows[i] = table.rows + places[i] * table.row;
      Transpose<Sum, kBytes>::run(rows, tile + p, kTileRow<Sum>);
    }
  }
};

}  // namespace spade_fast
