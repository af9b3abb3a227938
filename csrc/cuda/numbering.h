// What the kernels share that find equal things, windows of a map or vectors of a condition, and
// number them by first appearance.
//
// Everything has a place: those of a section, a layout at one size, one after the other, image by
// image. A section begins at a multiple of kThreads, a chunk, so that a block has places of one
// section alone; some of its last chunk's do not exist. A hash table finds for each place the first
// one of its section that is equal to it. Hashes decide nothing: a slot's entry is compared in
// full.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace spade_fast {

constexpr uint32_t kNone = ~0u;  // no place: a free slot, and what a window sees beyond the border
constexpr int kAxes = 3;         // of a map; where there are fewer, the first are of size 1
constexpr int kLevels = 2;       // windows, and windows of those

struct Section {
  uint32_t first, count;  // places
  uint32_t pixels;        // of an image
  uint32_t size[kAxes];
  // The same of the places that its windows see.
  uint32_t seen_first, seen_pixels, seen_size[kAxes];
  // Where the numbers of each axis begin: which pixel of the codes each place takes.
  uint32_t nearest[kAxes];
};

// One bit for each of 32 places that is the first of its kind, and how many are before those in
// their chunk.
struct Word {
  uint32_t is_first, before;
};

// The equal places of one kind of thing.
struct Level {
  uint32_t* table;   // [slots], a power of two: a place, or kNone
  uint32_t* firsts;  // [slots]: of all places that are equal to the one in the slot the first
  uint32_t slots, hash_mask;
  uint32_t* equals;  // [places]: the slot of each; then the first place that is equal to it
  Word* words;       // [places / 32]
  uint64_t* chunks;  // [chunks]: Counts of the chunk; then of those before it in its section
};

// How many first places there are, and how many taps within the border their windows have: two
// numbers that are added up together.
struct Counts {
  static __host__ __device__ uint64_t of(uint32_t firsts, uint32_t taps) {
    return firsts | static_cast<uint64_t>(taps) << 32;
  }
  static __host__ __device__ uint32_t firsts(uint64_t counts) {
    return static_cast<uint32_t>(counts);
  }
  static __host__ __device__ uint32_t taps(uint64_t counts) {
    return static_cast<uint32_t>(counts >> 32);
  }
};

// Shared memory of blocks that add up.
constexpr int64_t kScanScratch = kThreads / 32 * sizeof(uint64_t);

// The sections' maps, and the windows in them.
struct Maps {
  const Section* sections;
  uint32_t section_count, chunks;
  const int32_t* nearest;
  const int32_t* codes;  // [N, *given]
  uint32_t given[kAxes], kernel[kAxes], padding[kAxes], stride;
  uint32_t taps, rows;  // of a window, and of the palette
  uint32_t* is_wrong;   // not kNone where a code is no row
};

// A sequence of entries that is sorted by their buckets: it has the numbers from `bucket` on, of
// lists with one more for the end.
struct Segment {
  uint32_t entry, entries, bucket, buckets;
  int64_t sorted;  // where the results have what the entries say, sorted
  // Where they have which of those is each bucket's first, and the end; of lists alone.
  int64_t starts;
  int64_t ends;  // where they have the end once more, behind the starts of another list
};

// The results of a section, where the caller finds them: `layout.Sums` and `layout.Windows` have
// the names.
struct Result {
  int64_t offsets[kLevels], rows[kLevels], index, contents;
  uint32_t windows;  // of the last level
};

struct Results {
  const Result* of_sections;
  // [sections, levels]: their lists the other way round; then of each section its order.
  const Segment* segments;
  uint32_t lists, orders;      // how many segments are of which kind
  uint32_t entries, starts;    // of all segments
  uint32_t *buckets, *values;  // [entries]
  int32_t* memory;
};

// The codes at each place, [places].
void take_codes(Stream stream, const Maps& maps, uint32_t* map);
// The slots of the windows of a map.
void find_equal_windows(Stream stream, const Maps& maps, const uint32_t* map, const Level& level);
// From slots to first places.
void resolve_windows(Stream stream, const Maps& maps, const Level& level);
// Adds up the chunks of every section and level; totals [sections, levels] has Counts of all, and
// at its end what is_wrong points to.
void add_up(Stream stream, const Section* sections, uint32_t section_count, const Level* levels,
            int level_count, const uint32_t* is_wrong, uint64_t* totals);
// The index, the lists of windows, and the entries that are to be sorted.
void list_windows(Stream stream, const Maps& maps, const uint32_t* codes, const Level& hidden,
                  const Level& table, const Results& results);
// The same of windows of codes alone, and their contents.
void list_patches(Stream stream, const Maps& maps, const uint32_t* codes, const Level& level,
                  const Results& results);
// Entries that are to be sorted by their buckets, in passes of a digit each. Every pass takes them
// from one place to the other.
struct Sorting {
  uint32_t count;
  int64_t tiles;
  int passes;
  uint32_t *buckets[2], *values[2];  // [count]
  uint32_t* counts;                  // [passes, kDigits], zeros: how many entries have each digit
  uint32_t* said;     // [passes, tiles, kDigits], zeros: what the blocks say to those behind them
  uint32_t* tickets;  // [passes], zeros
};

constexpr int kDigitBits = 8;
constexpr int64_t kDigits = kThreads;
constexpr int64_t kSortTile = 8 * kThreads;  // entries of a block

void sort_entries(Stream stream, const Sorting& sorting);
// From sorted entries to what they say and where each bucket starts.
void place_sorted(Stream stream, const Results& results);

// Vectors of a condition [N, channels, pixels], of elements of 2, 4 or 8 bytes.
struct Vectors {
  const void* elements;
  int64_t size;
  uint32_t channels, pixels;
};

// As for windows, the pixels of all images as one section.
void find_equal_vectors(Stream stream, const Vectors& vectors, uint32_t places, const Level& level);
void resolve_vectors(Stream stream, uint32_t places, const Level& level);
// The code of each place, and the first place of each code.
void number_vectors(Stream stream, uint32_t places, const Level& level, int32_t* codes,
                    int64_t* first_places);

}  // namespace spade_fast
