// Finds the places of a map whose windows are equal (gives each place the slot of its window in a
// hash table, and each slot its first place), and writes the index, the lists and the entries that
// follow. One thread per place.

#include "places.h"

namespace spade_fast {
namespace {

// A place and its coordinates.
struct Where {
  Section section;
  uint32_t place, image, position[kAxes];
  bool exists;
};

__device__ uint32_t section_of(const Maps& maps, uint32_t chunk) {
  uint32_t number = maps.section_count - 1;
  while (chunk * kThreads < maps.sections[number].first) --number;
  return number;
}

__device__ Where where_is(const Section& section, uint32_t place) {
  Where where = {section, place};
  uint32_t rest = place - section.first;
  where.exists = rest < section.count;
  if (!where.exists) return where;
#pragma unroll
  for (int axis = kAxes - 1; axis >= 0; --axis) {
    where.position[axis] = rest % section.size[axis];
    rest /= section.size[axis];
  }
  where.image = rest;
  return where;
}

__device__ Where where_am_i(const Maps& maps, uint32_t chunk) {
  return where_is(maps.sections[section_of(maps, chunk)], chunk * kThreads + threadIdx.x);
}

__device__ uint32_t taps_inside(const Maps& maps, const Where& where) {
  uint32_t taps = 1;
#pragma unroll
  for (int axis = 0; axis < kAxes; ++axis) {
    const int32_t begin =
                      static_cast<int32_t>(where.position[axis] * maps.stride - maps.padding[axis]),
                  kernel = maps.kernel[axis];
    const int32_t rest = static_cast<int32_t>(where.section.seen[axis]) - begin;
    const int32_t inside = (rest < kernel ? rest : kernel) + (begin < 0 ? begin : 0);
    taps *= inside > 0 ? inside : 0;
  }
  return taps;
}

// What a tap of a place's window sees, kNone beyond the border: a code, at the pixel that
// F.interpolate(mode="nearest") takes, or the first place equal to the one there on the level
// before.
__device__ uint32_t seen(const Maps& maps, const uint32_t* before, const Where& where,
                         const uint32_t (&tap)[kAxes]) {
  const Section& section = where.section;
  bool inside = true;
  uint32_t place = where.image;
  int64_t pixel = where.image;
#pragma unroll
  for (int axis = 0; axis < kAxes; ++axis) {
    // A negative coordinate wraps around, beyond any size.
    const uint32_t there = where.position[axis] * maps.stride + tap[axis] - maps.padding[axis],
                   last = maps.given[axis] - 1;
    const float position = static_cast<float>(there) * section.scale[axis];
    inside = inside && there < section.seen[axis];
    place = place * section.seen[axis] + there;
    pixel = pixel * maps.given[axis] + (position < last ? static_cast<uint32_t>(position) : last);
  }
  if (!inside) return kNone;
  if (before != nullptr) return before[section.first + place];
  const uint32_t code = maps.codes[pixel];
  if (code >= maps.rows) store_now(maps.is_wrong, uint64_t{1});
  return code;
}

// Calls f with each tap until it returns false; returns whether it never did.
template <typename F>
__device__ bool each_tap(const Maps& maps, F&& f) {
  uint32_t tap[kAxes];
  for (tap[0] = 0; tap[0] < maps.kernel[0]; ++tap[0]) {
    for (tap[1] = 0; tap[1] < maps.kernel[1]; ++tap[1]) {
      for (tap[2] = 0; tap[2] < maps.kernel[2]; ++tap[2]) {
        if (!f(tap)) return false;
      }
    }
  }
  return true;
}

__global__ void __launch_bounds__(kThreads, 4)
    equal_windows_kernel(Maps maps, const uint32_t* before, Level level) {
  const Where where = where_am_i(maps, blockIdx.x);
  if (!where.exists) return;
  uint32_t hash = where.section.first;
  each_tap(maps, [&](const auto& tap) {
    hash = mixed(hash, seen(maps, before, where, tap));
    return true;
  });
  const uint32_t slot = slot_of(level, where.place, hash, [&](uint32_t other) {
    const Where there = where_is(where.section, other);
    return there.exists && each_tap(maps, [&](const auto& tap) {
             return seen(maps, before, where, tap) == seen(maps, before, there, tap);
           });
  });
  note_first(level, slot, where.place);
  level.equals[where.place] = slot;
}

// The last blocks add up the counts of the others, each those of a section.
__global__ void __launch_bounds__(kThreads) resolve_windows_kernel(Maps maps, Level level) {
  const uint32_t block = draw_ticket(level.tickets, reinterpret_cast<uint32_t*>(shared_memory()));
  if (block < maps.chunks) {
    const Where where = where_am_i(maps, block);
    resolve(level, block, where.exists, where.exists ? taps_inside(maps, where) : 0);
  } else {
    const uint32_t number = block - maps.chunks;
    add_up(level, maps.sections[number].first, maps.sections[number].count, number);
  }
}

// The entries that a block writes. Their digits are counted in shared memory.
class Writer {
 public:
  // Also zeroes the block's share of what the sort needs. A barrier must follow.
  __device__ explicit Writer(const Sorting& s)
      : sorting_(s), digits_(reinterpret_cast<uint32_t*>(shared_memory() + kScanScratch)) {
    const int64_t step = int64_t{gridDim.x} * kThreads;
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < s.passes * s.tiles * kDigits;
         i += step)
      s.said[i] = 0;
    for (int pass = 0; pass < s.passes; ++pass) digits_[pass * kDigits + threadIdx.x] = 0;
  }

  __device__ void write(uint32_t entry, uint32_t bucket, uint32_t value) const {
    sorting_.sides[0].buckets[entry] = bucket, sorting_.sides[0].values[entry] = value;
    for (int pass = 0; pass < sorting_.passes; ++pass)
      atomicAdd(digits_ + pass * kDigits + digit_of(bucket, pass), 1u);
  }

  // Adds the block's counts to those of all.
  __device__ void finish() const {
    __syncthreads();
    for (int pass = 0; pass < sorting_.passes; ++pass) {
      const uint32_t at = pass * kDigits + threadIdx.x, count = digits_[at];
      if (count > 0) atomicAdd(sorting_.counts + at, count);
    }
  }

 private:
  const Sorting& sorting_;
  uint32_t* digits_;
};

// For a window that first appears at this place, writes the list of what it sees, and an entry for
// each number in that list. `number` maps a tap to the number that it sees.
template <typename Number>
__device__ void list_window(const Maps& maps, const Where& where, uint32_t chunk,
                            const Level& level, const Segment& back, const Results& results,
                            uint32_t offsets, uint32_t rows, const Writer& writer,
                            Number&& number) {
  const bool is_first = where.exists && level.equals[where.place] == where.place;
  const uint32_t taps = is_first ? taps_inside(maps, where) : 0;
  uint32_t all;
  const uint32_t before =
      scan_block(taps, reinterpret_cast<uint32_t*>(shared_memory()), &all) - taps;
  if (!is_first) return;
  const uint32_t window = number_of(level, where.place);
  uint32_t at = Counts::taps(level.chunks[chunk]) + before, tap_number = 0;
  results.memory[offsets + window] = at;
  each_tap(maps, [&](const auto& tap) {
    const uint32_t other = number(tap);
    if (other != kNone) {
      const uint32_t row = other * maps.taps + tap_number;
      results.memory[rows + at] = row;
      writer.write(back.entry + at, back.bucket + row, window);
      ++at;
    }
    ++tap_number;
    return true;
  });
}

// Writes the number of a place's window to the index, and an entry for the place.
__device__ void list_place(const Where& where, const Level& level, const Segment& order,
                           const Results& results, const Result& result, const Writer& writer) {
  const uint32_t window = number_of(level, level.equals[where.place]),
                 local = where.place - where.section.first;
  results.memory[result.index + local] = window;
  writer.write(order.entry + local, order.bucket + where.image * result.windows + window,
               local - where.image * where.section.pixels);
}

// The first half of the blocks lists the windows of codes. The second half lists the windows of
// those windows, and writes the index.
__global__ void __launch_bounds__(kThreads, 4)
    list_windows_kernel(Maps maps, Level hidden, Level table, Results results, Sorting sorting) {
  const Writer writer(sorting);
  const uint32_t chunk = blockIdx.x % maps.chunks, section = section_of(maps, chunk);
  const Where where = where_am_i(maps, chunk);
  const Result& result = results.of_sections[section];
  const Segment* back = results.segments + section * kLevels;
  if (blockIdx.x < maps.chunks) {
    list_window(maps, where, chunk, hidden, back[0], results, result.offsets[0], result.rows[0],
                writer, [&](const auto& tap) { return seen(maps, nullptr, where, tap); });
  } else {
    list_window(maps, where, chunk, table, back[1], results, result.offsets[1], result.rows[1],
                writer, [&](const auto& tap) {
                  const uint32_t first = seen(maps, hidden.equals, where, tap);
                  return first == kNone ? kNone : number_of(hidden, first);
                });
    if (where.exists)
      list_place(where, table, results.segments[results.lists + section], results, result, writer);
  }
  writer.finish();
}

__global__ void __launch_bounds__(kThreads, 4)
    list_patches_kernel(Maps maps, Level level, Results results, Sorting sorting) {
  const Writer writer(sorting);
  const Where where = where_am_i(maps, blockIdx.x);
  const Result& result = results.of_sections[0];
  const auto code = [&](const auto& tap) { return seen(maps, nullptr, where, tap); };
  list_window(maps, where, blockIdx.x, level, results.segments[0], results, result.offsets[0],
              result.rows[0], writer, code);
  if (where.exists)
    list_place(where, level, results.segments[results.lists], results, result, writer);
  if (where.exists && level.equals[where.place] == where.place) {
    uint32_t at = result.contents + number_of(level, where.place) * maps.taps;
    each_tap(maps, [&](const auto& tap) {
      results.memory[at++] = static_cast<int32_t>(code(tap));  // kNone is -1
      return true;
    });
  }
  writer.finish();
}

int64_t list_memory(const Sorting& s) {
  return kScanScratch + s.passes * kDigits * sizeof(uint32_t);
}

}  // namespace

void find_equal_windows(Stream stream, const Maps& maps, const Level* before, const Level& level) {
  launch(equal_windows_kernel, maps.chunks, dim3(kThreads), 0, stream, maps,
         before != nullptr ? before->equals : nullptr, level);
}

void resolve_windows(Stream stream, const Maps& maps, const Level& level) {
  launch(resolve_windows_kernel, maps.chunks + maps.section_count, dim3(kThreads), kScanScratch,
         stream, maps, level);
}

void list_windows(Stream stream, const Maps& maps, const Level& hidden, const Level& table,
                  const Results& results, const Sorting& sorting) {
  launch(list_windows_kernel, 2 * maps.chunks, dim3(kThreads), list_memory(sorting), stream, maps,
         hidden, table, results, sorting);
}

void list_patches(Stream stream, const Maps& maps, const Level& level, const Results& results,
                  const Sorting& sorting) {
  launch(list_patches_kernel, maps.chunks, dim3(kThreads), list_memory(sorting), stream, maps,
         level, results, sorting);
}

}  // namespace spade_fast
