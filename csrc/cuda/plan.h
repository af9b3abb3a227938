// How the kernels divide their work between blocks: which planes, how many parts of each, and where
// one pass is enough.
//
// A block has a unit: a plane, or of an image with its channels last, neighbouring channels. It
// goes through the unit's items: strips of a plane, 32·V pixels that a warp has at a time, or
// pixels, of which each thread has V channels. Threads are (columns, lanes): columns side by side
// in memory, lanes at different items.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "operands.h"

namespace spade_fast {

struct Division {
  int64_t units, splits;       // blocks
  int64_t items, split_items;  // of a unit, and of a split of it
  int64_t split_pixels;
  int columns, lanes;
  bool units_first;  // whether neighbouring blocks are of different units
  // Bytes of shared memory: 16 for each thread at each item, for each tensor that is held.
  int64_t held_bytes;

  int64_t blocks() const { return units * splits; }
  int64_t threads() const { return columns * lanes; }
  // Bytes: the held elements, and behind them a few numbers of each warp for each of its planes.
  int64_t shared(int64_t numbers, int64_t planes_of_column) const {
    return held_bytes +
           threads() / 32 * numbers * 4 * (planes_of_column == 1 ? 1 : columns * planes_of_column);
  }
};

inline int64_t divide_up(int64_t number, int64_t by) { return (number + by - 1) / by; }

inline int64_t power_from(int64_t number) {
  int64_t power = 1;
  while (power < number) power *= 2;
  return power;
}

// Threads side by side over this number of vectors of channels: 16 or 8, whichever leaves fewer
// idle; two at least, which share a byte of signs.
inline int columns_of(int64_t vectors) {
  const auto idle = [&](int64_t columns) {
    return divide_up(vectors, columns) * columns - vectors;
  };
  const int64_t most = std::clamp<int64_t>(power_from(vectors), 2, 16);
  return static_cast<int>(most == 16 && idle(8) < idle(16) ? 8 : most);
}

inline Division divide(const Shape& shape, int vector, bool last, int columns, int64_t threads) {
  Division d = {};
  d.columns = columns;
  d.units = shape.images * (last ? divide_up(shape.channels, columns * vector) : shape.channels);
  d.items = last ? shape.pixels : divide_up(shape.pixels, 32 * vector);
  d.lanes = static_cast<int>(
      std::clamp(power_from(d.items), std::max<int64_t>(1, 32 / columns), threads / columns));
  d.splits = 1;
  d.split_items = d.items;
  return d;
}

inline Division split(Division d, int64_t splits, int vector, bool last) {
  d.split_items = std::max<int64_t>(1, divide_up(divide_up(d.items, d.lanes), splits)) * d.lanes;
  d.splits = std::max<int64_t>(1, divide_up(d.items, d.split_items));
  d.split_pixels = d.split_items * (last ? 1 : 32 * vector);
  return d;
}

constexpr int64_t kThreads = 256;      // of a block
constexpr int64_t kMostThreads = 512;  // of a block that holds large planes
constexpr int64_t kCombiners = 1024;   // of a block that combines what splits found
constexpr int64_t kBlocks = 8;         // for each processor: enough to keep it busy
// Where each leaves something to combine, and has several loads under way.
constexpr int64_t kSweepBlocks = 4;
constexpr int64_t kCluster = 8;  // blocks of a cluster at most: what every GPU with clusters has

inline int columns_of(const Shape& shape, int vector, bool last) {
  return last ? columns_of(divide_up(shape.channels, vector)) : 32;
}

// For kernels that find something of whole planes: the fewer blocks, the less there is to combine;
// four items of a thread at least.
inline Division sweep(const Shape& shape, int vector, bool last, int64_t processors) {
  const Division d = divide(shape, vector, last, columns_of(shape, vector, last), kThreads);
  const int64_t wanted = divide_up(kSweepBlocks * processors, std::max<int64_t>(1, d.units));
  return split(d, std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, d.items / (4 * d.lanes))),
               vector, last);
}

// For kernels whose blocks are on their own: up to four items of a thread, which share the numbers
// of their planes.
inline Division tiles(const Shape& shape, int vector, bool last, bool table, int64_t processors) {
  Division d = divide(shape, vector, last, columns_of(shape, vector, last), kThreads);
  const int64_t rounds = d.units * divide_up(d.items, 4 * d.lanes) < kBlocks * processors ? 1 : 4;
  d = split(d, std::max<int64_t>(1, divide_up(d.items, d.lanes * rounds)), vector, last);
  d.units_first = table && !last;  // neighbouring channels read the same rows of the table
  return d;
}

// For kernels that hold the planes of `held` tensors whole: nothing where they do not fit, or would
// leave most processors idle for long. What does not fit into one block is held by the blocks of a
// cluster, which read each other's shared memory.
inline std::optional<Division> one_pass(const Shape& shape, int vector, bool last, int64_t held,
                                        int64_t most_shared, int64_t most_blocks,
                                        int64_t processors) {
  if (shape.pixels == 0) return std::nullopt;
  for (int64_t blocks = 1; blocks <= most_blocks; blocks *= 2) {
    for (int columns = columns_of(shape, vector, last); columns >= 2; columns /= 2) {
      Division d = divide(shape, vector, last, columns, kThreads);
      if (d.items > 8 * d.lanes * blocks) d = divide(shape, vector, last, columns, kMostThreads);
      if (blocks > 1 && d.items < d.lanes * blocks) break;  // one for each thread, at least
      d = split(d, blocks, vector, last);
      d.splits = blocks;  // even if nothing is left for the last
      d.split_items = std::min(d.split_items, d.items);
      d.held_bytes = held * d.split_items * d.columns * 16;
      // Fewer channels would do, of more blocks on each processor.
      const bool wide = last && columns > 2;
      const bool busy = 2 * d.blocks() >= processors || (!wide && d.items <= 16 * d.lanes);
      if (busy && d.shared(1, last ? vector : 1) <= most_shared / (wide ? 3 : 1)) return d;
      if (!last) break;
    }
  }
  return std::nullopt;
}

}  // namespace spade_fast
