// How the kernels divide their work between blocks, and whether one pass is enough.
//
// A unit is a plane, or with channels last some adjacent channels of one image. It consists of
// items: strips of a plane, 32·V pixels for a warp, or with channels last pixels, with V channels
// for each thread. A block handles a split of a unit's items. Its threads are (columns, lanes):
// threadIdx.x counts columns, which are adjacent in memory, and threadIdx.y counts lanes, which
// handle different items.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "operands.h"

namespace spade_fast {

struct Division {
  int64_t units, splits;       // blocks
  int64_t items, split_items;  // per unit, and per split
  int64_t split_pixels;
  int columns, lanes;
  bool units_first;  // whether consecutive blocks have different units
  // Bytes of shared memory for elements that are held: 16 per thread, item and tensor.
  int64_t held_bytes;

  int64_t blocks() const { return units * splits; }
  int64_t threads() const { return columns * lanes; }
  // Bytes of shared memory in all: the held elements, and behind them some numbers per warp and
  // plane.
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

// The columns for this number of vectors of channels: 16 or 8, whichever leaves fewer threads idle.
// At least two, because two threads may share a byte of signs.
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

constexpr int64_t kThreads = 256;      // per block
constexpr int64_t kMostThreads = 512;  // per block that holds large planes
constexpr int64_t kCombiners = 1024;   // per block that combines splits
constexpr int64_t kBlocks = 8;         // per SM, enough to keep it busy
// Blocks per SM for kernels that leave a partial result per block and keep several loads in flight.
constexpr int64_t kSweepBlocks = 4;
constexpr int64_t kReserved = 1 << 10;  // bytes of an SM's shared memory that each block takes, too
constexpr int64_t kCluster = 8;  // most blocks of a cluster that every GPU with clusters supports

inline int columns_of(const Shape& shape, int vector, bool last) {
  return last ? columns_of(divide_up(shape.channels, vector)) : 32;
}

// For kernels that reduce whole planes: few blocks, because each leaves a partial result to
// combine, and at least four items per thread.
inline Division sweep(const Shape& shape, int vector, bool last, int64_t processors) {
  const Division d = divide(shape, vector, last, columns_of(shape, vector, last), kThreads);
  const int64_t wanted = divide_up(kSweepBlocks * processors, std::max<int64_t>(1, d.units));
  return split(d, std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, d.items / (4 * d.lanes))),
               vector, last);
}

// For elementwise kernels: up to four items per thread, which share the numbers of their planes.
inline Division tiles(const Shape& shape, int vector, bool last, bool table, int64_t processors) {
  Division d = divide(shape, vector, last, columns_of(shape, vector, last), kThreads);
  const int64_t rounds = d.units * divide_up(d.items, 4 * d.lanes) < kBlocks * processors ? 1 : 4;
  d = split(d, std::max<int64_t>(1, divide_up(d.items, d.lanes * rounds)), vector, last);
  d.units_first = table && !last;  // adjacent channels read the same rows of the table
  return d;
}

// For kernels that hold whole units of `held` tensors in shared memory; nullopt if those do not
// fit, or would leave most SMs idle for long. A unit that does not fit into one block is held by
// the blocks of a cluster, which read each other's shared memory.
inline std::optional<Division> one_pass(const Shape& shape, int vector, bool last, int64_t held,
                                        int64_t most_shared, int64_t most_blocks,
                                        int64_t processors) {
  if (shape.pixels == 0) return std::nullopt;
  for (int64_t blocks = 1; blocks <= most_blocks; blocks *= 2) {
    for (int columns = columns_of(shape, vector, last); columns >= 2; columns /= 2) {
      Division d = divide(shape, vector, last, columns, kThreads);
      const bool wide = last && columns > 2;
      // Large units get more threads, unless two blocks of fewer share an SM: while one waits for
      // memory, the other computes.
      const bool shares = wide && d.units * blocks > processors;
      if (d.items > 8 * d.lanes * blocks && !shares)
        d = divide(shape, vector, last, columns, kMostThreads);
      if (blocks > 1 && d.items < d.lanes * blocks) break;  // at least one item per thread
      d = split(d, blocks, vector, last);
      d.splits = blocks;  // even if the last ones have no items
      d.split_items = std::min(d.split_items, d.items);
      d.held_bytes = held * d.split_items * d.columns * 16;
      // A thread with few items waits for memory anyway, so that more SMs would not help.
      const bool few = d.items <= 4 * d.lanes * blocks, busy = 2 * d.blocks() >= processors;
      // Two of more columns read 32 bytes at a time, half of what memory transfers at once. A wide
      // block could be narrower, so it is taken only if an SM has room for three.
      const bool half = last && !wide && d.units > shape.images;
      const bool fast = half ? few : busy || (few && !wide);
      const int64_t most = wide ? (most_shared + kReserved) / 3 - kReserved : most_shared;
      if (fast && d.shared(1, last ? vector : 1) <= most) return d;
      if (!last) break;
    }
  }
  return std::nullopt;
}

}  // namespace spade_fast
