// Shared by the kernels that find equal things (windows of a map, or vectors of a condition) and
// number them in order of first appearance.
//
// Every thing has a place. A section is a layout at one size, with its places image by image;
// sections follow each other. A section begins at a multiple of kThreads, so that the places of a
// block, a chunk, belong to one section; some places of its last chunk do not exist. For each
// place, a hash table finds the first equal place of the same section. Hashes only find candidates:
// things are compared in full.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace spade_fast {

constexpr uint32_t kNone = ~0u;  // no place: a free slot, or beyond the border
constexpr int kAxes = 3;         // of a map; missing leading axes have size 1
constexpr int kLevels = 2;       // windows of codes, and windows of those
constexpr int kMostSizes = 16;   // of a call: sections are passed to kernels by value

struct Section {
  uint32_t first, count;  // places
  uint32_t pixels;        // per image
  uint32_t size[kAxes];
  uint32_t seen[kAxes];  // the size of the maps that its windows see
  float scale[kAxes];    // the size of the codes, divided by that
};

// One bit for each of 32 places, set if the place is the first of its kind, and the number of first
// places before them in their chunk.
struct Word {
  uint32_t is_first, before;
};

// The state of one numbering. The arrays that begin as zeros hold ~place for a place, so that zero
// means none.
struct Level {
  uint32_t* table;   // [slots], zeroed, a power of two: a place
  uint32_t* firsts;  // [slots], zeroed: the first of all places equal to the one in the slot
  uint32_t slots, hash_mask;
  uint32_t* equals;   // [places]: the slot of each; after resolve, the first place equal to it
  Word* words;        // [places / 32]
  uint64_t* chunks;   // [chunks], zeroed: Counts of each; after add_up, of those before it in its
                      // section
  uint64_t* totals;   // [sections]: Counts of each
  uint32_t* tickets;  // [1], zeroed
};

// The number of first places, and of taps within the border of their windows: two counts that are
// added together as one 64-bit number. kSaid is set in those that a block publishes for others.
struct Counts {
  static constexpr uint64_t kSaid = uint64_t{1} << 63;
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

// The shared memory that scan_block needs.
constexpr int64_t kScanScratch = kThreads / 32 * sizeof(uint64_t);

// The sections' maps, and the windows in them.
struct Maps {
  Section sections[kMostSizes];
  uint32_t section_count, chunks;
  const int32_t* codes;  // [N, *given]
  uint32_t given[kAxes], kernel[kAxes], padding[kAxes], stride;
  uint32_t taps, rows;  // of a window; of the palette
  uint64_t* is_wrong;   // zeroed; not zero if a code is out of range
};

// A range of entries that are sorted by bucket. Its buckets are numbered from `bucket` on; lists
// have one more, for the end.
struct Segment {
  uint32_t entry, entries, bucket, buckets;
  uint32_t sorted;  // where the results hold the sorted values
  // Where the results hold the start of each bucket among those, and the end; lists only.
  uint32_t starts;
  uint32_t ends;  // where they hold the end again, behind the offsets of the other direction
};

// The offsets of a section's results in memory, with the names of `windows.Sums` and
// `windows.Windows`.
struct Result {
  uint32_t offsets[kLevels], rows[kLevels], index, contents;
  uint32_t windows;  // of the last level
};

struct Results {
  Result of_sections[kMostSizes];
  // [sections, levels] for the lists of the reverse direction, then [sections] for the orders.
  Segment segments[(kLevels + 1) * kMostSizes];
  uint32_t lists, orders;    // the number of segments of each kind
  uint32_t entries, starts;  // of all segments
  int32_t* memory;
};

struct Entries {
  uint32_t *buckets, *values;
};

// Entries to be sorted by bucket, one digit per pass. Each pass moves them from one side to the
// other.
struct Sorting {
  uint32_t count;
  int passes;
  int64_t tiles;
  Entries sides[2];   // [count] each
  uint32_t* counts;   // [passes, kDigits], zeroed: the number of entries with each digit
  uint32_t* said;     // [passes, tiles, kDigits]: counts that tiles publish for later tiles
  uint32_t* tickets;  // [passes], zeroed
};

constexpr int kDigitBits = 8;
constexpr int kMostPasses = 4;
constexpr int64_t kDigits = kThreads;
constexpr int64_t kSortTile = 8 * kThreads;  // entries per block

// Finds the slots of the windows of codes, or of the windows of the level before.
void find_equal_windows(Stream stream, const Maps& maps, const Level* before, const Level& level);
// Replaces slots by first places, counts those per chunk, and adds up the counts of each section.
void resolve_windows(Stream stream, const Maps& maps, const Level& level);
// Writes the index, the lists of windows, and the entries to be sorted, whose digits it counts.
void list_windows(Stream stream, const Maps& maps, const Level& hidden, const Level& table,
                  const Results& results, const Sorting& sorting);
// The same for windows of codes alone, and their contents.
void list_patches(Stream stream, const Maps& maps, const Level& level, const Results& results,
                  const Sorting& sorting);
void sort_entries(Stream stream, const Sorting& sorting);
// Writes the sorted values, and where each bucket starts, to the results.
void place_sorted(Stream stream, const Results& results, const Entries& sorted);

// The vectors of a condition [N, channels, pixels], whose elements have 2, 4 or 8 bytes.
struct Vectors {
  const void* elements;
  int64_t size;
  uint32_t channels, pixels;
};

// The same as for windows, with the pixels of all images as one section.
void find_equal_vectors(Stream stream, const Vectors& vectors, uint32_t places, const Level& level);
void resolve_vectors(Stream stream, uint32_t places, const Level& level);
// Writes the code of each place, and the first place of each code.
void number_vectors(Stream stream, uint32_t places, const Level& level, int32_t* codes,
                    int64_t* first_places);

}  // namespace spade_fast
