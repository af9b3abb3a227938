// The sums of listed rows: what convolution.cpp passes to sum_lists.cu.
#pragma once

#include "operands.h"

namespace spade_fast {

// Sum i is over the rows x[listed[offsets[i]]], ..., x[listed[offsets[i + 1] − 1]].
struct Lists {
  const int32_t *offsets, *listed;
  int64_t count, entries;  // the number of lists, and of entries in `listed`

  // Where list i begins in `listed`; clamped, because the offsets are not checked.
  __device__ int64_t begin(int64_t i) const {
    const int64_t place = offsets[i];
    return place < 0 ? 0 : place < entries ? place : entries;
  }
};

// A list of more entries than this is cut into pieces, at the multiples of this in `listed`.
constexpr int64_t kShortList = 32;

struct ListSums {
  Lists lists;
  Rows x, sums;
  int64_t rows, columns;
  bool vector;  // whether rows are aligned to 16 bytes and consist of whole vectors
  int64_t pieces;
  // [2 · pieces, columns]: two partial sums per piece, of the long lists that contain its first and
  // its last entry.
  float* parts;
  int32_t* begun;  // [pieces]: the long list that begins in each, or −1
};

// The number of pieces that `listed` is cut into; 0 if no list can be long.
inline int64_t pieces_of(const Lists& lists) {
  return lists.count > 0 && lists.entries > kShortList
             ? (lists.entries + kShortList - 1) / kShortList
             : 0;
}

void sum_lists(Stream stream, const ListSums& s);

}  // namespace spade_fast
