// Finds the places of a map whose windows are equal (gives each place the slot of its window in a
// hash table, and each slot its first place), and writes the index and the lists that follow. One
// thread per place.

#include "places.h"

namespace spade_fast {
namespace {

// A place and its coordinates.
struct Where {
  const Section* section;
  uint32_t place, image, position[kAxes];
  bool exists;
};

__device__ uint32_t section_of(const Maps& maps, uint32_t chunk) {
  uint32_t number = maps.section_count - 1;
  while (chunk * kThreads < maps.sections[number].first) --number;
  return number;
}

__device__ Where where_is(const Section* section, uint32_t place) {
  Where where = {section, place};
  uint32_t rest = place - section->first;
  where.exists = rest < section->count;
  if (!where.exists) return where;
#pragma unroll
  for (int axis = kAxes - 1; axis >= 0; --axis) {
    where.position[axis] = rest % section->size[axis];
    rest /= section->size[axis];
  }
  where.image = rest;
  return where;
}

__device__ Where where_am_i(const Maps& maps, uint32_t chunk) {
  return where_is(maps.sections + section_of(maps, chunk), chunk * kThreads + threadIdx.x);
}

__device__ uint32_t taps_inside(const Maps& maps, const Where& where) {
  uint32_t taps = 1;
#pragma unroll
  for (int axis = 0; axis < kAxes; ++axis) {
    const int32_t begin =
                      static_cast<int32_t>(where.position[axis] * maps.stride - maps.padding[axis]),
                  kernel = maps.kernel[axis];
    const int32_t rest = static_cast<int32_t>(where.section->seen_size[axis]) - begin;
    const int32_t inside = (rest < kernel ? rest : kernel) + (begin < 0 ? begin : 0);
    taps *= inside > 0 ? inside : 0;
  }
  return taps;
}

// The value that a tap of a place's window sees, kNone beyond the border.
__device__ uint32_t seen(const Maps& maps, const uint32_t* map, const Where& where,
                         const uint32_t (&tap)[kAxes]) {
  const Section& section = *where.section;
  bool inside = true;
  uint32_t place = 0;
#pragma unroll
  for (int axis = 0; axis < kAxes; ++axis) {
    // A negative coordinate wraps around, beyond any size.
    const uint32_t there = where.position[axis] * maps.stride + tap[axis] - maps.padding[axis];
    inside = inside && there < section.seen_size[axis];
    place = place * section.seen_size[axis] + there;
  }
  return inside ? map[section.seen_first + where.image * section.seen_pixels + place] : kNone;
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

__global__ void __launch_bounds__(kThreads) codes_kernel(Maps maps, uint32_t* map) {
  const Where where = where_am_i(maps, blockIdx.x);
  if (!where.exists) return;
  int64_t pixel = where.image;
#pragma unroll
  for (int axis = 0; axis < kAxes; ++axis) {
    pixel = pixel * maps.given[axis] +
            maps.nearest[where.section->nearest[axis] + where.position[axis]];
  }
  const uint32_t code = static_cast<uint32_t>(maps.codes[pixel]);
  // Other threads may store the same value.
  if (code >= maps.rows) *static_cast<volatile uint32_t*>(maps.is_wrong) = 0;
  map[where.place] = code < maps.rows ? code : 0;
}

__global__ void __launch_bounds__(kThreads)
    equal_windows_kernel(Maps maps, const uint32_t* map, Level level) {
  const Where where = where_am_i(maps, blockIdx.x);
  if (!where.exists) return;
  uint32_t hash = where.section->first;
  each_tap(maps, [&](const auto& tap) {
    hash = mixed(hash, seen(maps, map, where, tap));
    return true;
  });
  const uint32_t slot = slot_of(level, where.place, hash, [&](uint32_t other) {
    const Where there = where_is(where.section, other);
    return there.exists && each_tap(maps, [&](const auto& tap) {
             return seen(maps, map, where, tap) == seen(maps, map, there, tap);
           });
  });
  note_first(level, slot, where.place);
  level.equals[where.place] = slot;
}

__global__ void __launch_bounds__(kThreads) resolve_windows_kernel(Maps maps, Level level) {
  const Where where = where_am_i(maps, blockIdx.x);
  resolve(level, where.place, where.exists, where.exists ? taps_inside(maps, where) : 0);
}

// For a window that first appears at this place, writes the list of what it sees, and an entry for
// each number in that list. `number` maps a tap to the number that it sees.
template <typename Number>
__device__ void list_window(const Maps& maps, const Where& where, uint32_t chunk,
                            const Level& level, const Segment& back, const Results& results,
                            int64_t offsets, int64_t rows, Number&& number) {
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
      results.buckets[back.entry + at] = back.bucket + row;
      results.values[back.entry + at] = window;
      ++at;
    }
    ++tap_number;
    return true;
  });
}

// Writes the number of a place's window to the index, and an entry for the place.
__device__ void list_place(const Where& where, const Level& level, const Segment& order,
                           const Results& results, const Result& result) {
  const uint32_t window = number_of(level, level.equals[where.place]),
                 local = where.place - where.section->first;
  results.memory[result.index + local] = window;
  results.buckets[order.entry + local] = order.bucket + where.image * result.windows + window;
  results.values[order.entry + local] = local - where.image * where.section->pixels;
}

// The first half of the blocks lists the windows of codes. The second half lists the windows of
// those windows, and writes the index.
__global__ void __launch_bounds__(kThreads, 4)
    list_windows_kernel(Maps maps, const uint32_t* codes, Level hidden, Level table,
                        Results results) {
  const uint32_t chunk = blockIdx.x % maps.chunks, section = section_of(maps, chunk);
  const Where where = where_am_i(maps, chunk);
  const Result& result = results.of_sections[section];
  const Segment* back = results.segments + section * kLevels;
  if (blockIdx.x < maps.chunks) {
    list_window(maps, where, chunk, hidden, back[0], results, result.offsets[0], result.rows[0],
                [&](const auto& tap) { return seen(maps, codes, where, tap); });
    return;
  }
  list_window(maps, where, chunk, table, back[1], results, result.offsets[1], result.rows[1],
              [&](const auto& tap) {
                const uint32_t first = seen(maps, hidden.equals, where, tap);
                return first == kNone ? kNone : number_of(hidden, first);
              });
  if (where.exists)
    list_place(where, table, results.segments[results.lists + section], results, result);
}

__global__ void __launch_bounds__(kThreads, 4)
    list_patches_kernel(Maps maps, const uint32_t* codes, Level level, Results results) {
  const Where where = where_am_i(maps, blockIdx.x);
  const Result& result = *results.of_sections;
  list_window(maps, where, blockIdx.x, level, *results.segments, results, result.offsets[0],
              result.rows[0], [&](const auto& tap) { return seen(maps, codes, where, tap); });
  if (!where.exists) return;
  list_place(where, level, results.segments[results.lists], results, result);
  if (level.equals[where.place] != where.place) return;
  int64_t at = result.contents + static_cast<int64_t>(number_of(level, where.place)) * maps.taps;
  each_tap(maps, [&](const auto& tap) {
    results.memory[at++] = static_cast<int32_t>(seen(maps, codes, where, tap));  // kNone is -1
    return true;
  });
}

}  // namespace

void take_codes(Stream stream, const Maps& maps, uint32_t* map) {
  launch(codes_kernel, maps.chunks, dim3(kThreads), 0, stream, maps, map);
}

void find_equal_windows(Stream stream, const Maps& maps, const uint32_t* map, const Level& level) {
  launch(equal_windows_kernel, maps.chunks, dim3(kThreads), 0, stream, maps, map, level);
}

void resolve_windows(Stream stream, const Maps& maps, const Level& level) {
  launch(resolve_windows_kernel, maps.chunks, dim3(kThreads), kScanScratch, stream, maps, level);
}

void list_windows(Stream stream, const Maps& maps, const uint32_t* codes, const Level& hidden,
                  const Level& table, const Results& results) {
  launch(list_windows_kernel, 2 * maps.chunks, dim3(kThreads), kScanScratch, stream, maps, codes,
         hidden, table, results);
}

void list_patches(Stream stream, const Maps& maps, const uint32_t* codes, const Level& level,
                  const Results& results) {
  launch(list_patches_kernel, maps.chunks, dim3(kThreads), kScanScratch, stream, maps, codes, level,
         results);
}

}  // namespace spade_fast
