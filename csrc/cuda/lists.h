// Sums of listed rows, as convolution.cpp calls them and sum_lists.cu has them.
#pragma once

#include "operands.h"

namespace spade_fast {

// Sum i is over the rows x[listed[offsets[i]]], ..., x[listed[offsets[i + 1] − 1]].
struct Lists {
  const int32_t *offsets, *listed;
  int64_t count, entries;  // lists, and numbers in `listed`

  // Where list i begins in `listed`; whatever the offsets are, within it.
  __device__ int64_t begin(int64_t i) const {
    const int64_t place = offsets[i];
    return place < 0 ? 0 : place < entries ? place : entries;
  }
};

// A list of more numbers than this is cut into pieces, at the multiples of this in `listed`.
constexpr int64_t kShortList = 32;

struct ListSums {
  Lists lists;
  Rows x, sums;
  int64_t rows, columns;
  bool vector;  // whether all rows begin at addresses divisible by 16, and have whole vectors
  int64_t pieces;
  // [2 · pieces, columns]: of the long list that a piece begins with, and of one that begins inside
  // it.
  float* parts;
  int32_t* begun;  // [pieces]: the long list that begins in each, or −1
};

// Into how many pieces lists are cut; none where none can be long.
inline int64_t pieces_of(const Lists& lists) {
  return lists.count > 0 && lists.entries > kShortList
             ? (lists.entries + kShortList - 1) / kShortList
             : 0;
}

void sum_lists(Stream stream, const ListSums& s);

}  // namespace spade_fast
