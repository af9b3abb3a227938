// The Python module spade_fast._cpu. Importing it registers the CPU kernels as operators; the
// module itself exports the functions that run on the host only.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "codes.h"
#include "ranges.h"
#include "windows.h"

namespace spade_fast {
namespace {

using Numbers = pybind11::array_t<int32_t, pybind11::array::c_style>;

// An array that takes over the memory of `values`.
Numbers as_array(std::vector<int32_t>&& values, std::vector<int64_t> shape) {
  auto owner = std::make_unique<std::vector<int32_t>>(std::move(values));
  const int32_t* data = owner->data();
  const pybind11::capsule memory(
      owner.get(), [](void* pointer) { delete static_cast<std::vector<int32_t>*>(pointer); });
  owner.release();
  return Numbers(std::move(shape), data, memory);
}

Numbers as_array(std::vector<int32_t>&& values) {
  const int64_t count = values.size();
  return as_array(std::move(values), {count});
}

void require(bool holds, const std::string& message) {
  if (!holds) throw pybind11::value_error(message);
}

std::string shape_text(const pybind11::array& given) { return pybind11::str(given.attr("shape")); }

void check_range(const Numbers& given, const char* name, int64_t least, int64_t bound) {
  const std::string wrong = out_of_range(name, given.data(), given.size(), least, bound);
  require(wrong.empty(), wrong);
}

std::vector<int64_t> shape_of(const Numbers& given) {
  return {given.shape(), given.shape() + given.ndim()};
}

// Checks a map whose windows are to be numbered, and returns the number of taps of each.
int64_t check_map(const Numbers& map, int64_t kernel_size) {
  require(map.ndim() >= 2 && map.ndim() <= 4,
          "map has shape " + shape_text(map) + "; it should be [N, *spatial]");
  require(countable(1, map.size()),
          "map has shape " + shape_text(map) + "; it should have fewer than 2147483647 places");
  int64_t taps = 1;
  for (int64_t axis = 1; axis < map.ndim(); ++axis) {
    require(kernel_size >= 1 && countable(taps, kernel_size),
            "kernel_size is " + std::to_string(kernel_size) +
                "; it should be at least 1 and give windows of fewer than 2147483647 taps");
    taps *= kernel_size;
  }
  check_range(map, "map", 0, INT32_MAX);
  return taps;
}

std::tuple<Numbers, Numbers> number_windows_of(const Numbers& map, int64_t kernel_size,
                                               uint64_t hash_mask) {
  const int64_t taps = check_map(map, kernel_size);
  const std::vector<int64_t> shape = shape_of(map);
  Numbers numbers(shape);
  const int32_t* from = map.data();
  int32_t* to = numbers.mutable_data();
  std::vector<int32_t> contents;
  {
    const pybind11::gil_scoped_release release;
    contents = number_windows(from, shape, kernel_size, hash_mask, to);
  }
  const int64_t windows = contents.size() / taps;
  return {numbers, as_array(std::move(contents), {windows, taps})};
}

// For each map: the lists of its windows, those of the windows of these, index and order.
std::vector<std::vector<Numbers>> find_windows_of(const std::vector<Numbers>& maps,
                                                  int64_t kernel_size, int64_t rows) {
  std::vector<MapWindows> all;
  std::vector<std::pair<Numbers, Numbers>> places;
  for (const Numbers& map : maps) {
    const int64_t taps = check_map(map, kernel_size);
    require(rows >= 0 && countable(rows, taps),
            "rows is " + std::to_string(rows) +
                "; it should be 0 or more, and times the taps of a window below 2147483647");
    const std::vector<int64_t> shape = shape_of(map);
    const int64_t pixels =
        std::accumulate(shape.begin() + 1, shape.end(), int64_t{1}, std::multiplies<int64_t>());
    Numbers index(shape), order({shape[0], pixels});
    all.push_back({map.data(), shape, index.mutable_data(), order.mutable_data()});
    places.emplace_back(std::move(index), std::move(order));
  }
  {
    const pybind11::gil_scoped_release release;
    find_windows(kernel_size, rows, &all);
  }
  std::vector<std::vector<Numbers>> results;
  for (size_t i = 0; i < all.size(); ++i) {
    require(all[i].wrong.empty(), all[i].wrong);
    std::vector<Numbers>& result = results.emplace_back();
    for (auto* lists : {all[i].hidden, all[i].table}) {
      for (int64_t list = 0; list < 4; ++list) result.push_back(as_array(std::move(lists[list])));
    }
    result.push_back(std::move(places[i].first));
    result.push_back(std::move(places[i].second));
  }
  return results;
}

std::tuple<Numbers, Numbers, Numbers, Numbers> window_sums_of(const Numbers& contents,
                                                              int64_t rows) {
  require(contents.ndim() == 2,
          "contents has shape " + shape_text(contents) + "; it should be [windows, taps]");
  const int64_t windows = contents.shape(0), taps = contents.shape(1);
  require(rows >= 0 && countable(rows, std::max<int64_t>(1, taps)) && countable(windows, taps),
          "contents has shape " + shape_text(contents) + " and rows is " + std::to_string(rows) +
              "; rows should be 0 or more, and windows * taps and rows * taps below 2147483647");
  check_range(contents, "contents", -1, rows);
  const int32_t* data = contents.data();
  std::vector<int32_t> found[4];
  {
    const pybind11::gil_scoped_release release;
    window_sums(data, windows, taps, rows, found);
  }
  return {as_array(std::move(found[0])), as_array(std::move(found[1])),
          as_array(std::move(found[2])), as_array(std::move(found[3]))};
}

Numbers sort_pixels_of(const Numbers& index, int64_t bound) {
  require(index.ndim() == 2, "index has shape " + shape_text(index) + "; it should be [N, pixels]");
  const int64_t images = index.shape(0), pixels = index.shape(1);
  require(countable(1, pixels),
          "index has shape " + shape_text(index) + "; it should have fewer than 2147483647 pixels");
  require(bound >= 0 && bound <= int64_t{1} << 31,
          "bound is " + std::to_string(bound) + "; it should be from 0 to 2147483648");
  check_range(index, "index", 0, bound);
  Numbers order({images, pixels});
  const int32_t* from = index.data();
  int32_t* to = order.mutable_data();
  {
    const pybind11::gil_scoped_release release;
    sort_pixels(from, {images, pixels}, bound, to);
  }
  return order;
}

constexpr InstructionSet kAll[] = {InstructionSet::avx512_bf16, InstructionSet::avx512,
                                   InstructionSet::avx2, InstructionSet::base};
constexpr const char* kNames[] = {"base", "avx2", "avx512", "avx512_bf16"};

bool supported(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::avx2) return __builtin_cpu_supports("x86-64-v3");
  if (set == InstructionSet::avx512) return __builtin_cpu_supports("x86-64-v4");
  if (set == InstructionSet::avx512_bf16)
    return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
#endif
  return set == InstructionSet::base;
}

InstructionSet named(const std::string& name) {
  for (const auto set : kAll) {
    if (name != kNames[static_cast<int>(set)]) continue;
    if (supported(set)) return set;
    throw pybind11::value_error("the instruction set is " + name +
                                ", which this processor does not support");
  }
  throw pybind11::value_error("the instruction set is " + name +
                              "; it should be base, avx2, avx512 or avx512_bf16");
}

// The kernels' instruction sets that this processor supports, best first.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto set : kAll) {
    if (supported(set)) names.push_back(kNames[static_cast<int>(set)]);
  }
  return names;
}

std::atomic<InstructionSet> in_use{InstructionSet::base};

// Codes and first places of a contiguous condition [N, L, *spatial], whose elements are compared as
// integers of their size; nullopt if it has too many codes.
std::optional<std::tuple<Numbers, pybind11::array_t<int64_t>>> find_codes_of(
    const pybind11::array& segmap) {
  require(segmap.ndim() >= 3 && (segmap.flags() & pybind11::array::c_style) != 0,
          "segmap has shape " + shape_text(segmap) +
              "; it should be [N, channels, *spatial] and contiguous");
  require(segmap.itemsize() == 2 || segmap.itemsize() == 4 || segmap.itemsize() == 8,
          "segmap has elements of " + std::to_string(segmap.itemsize()) +
              " bytes; they should be of 2, 4 or 8");
  std::vector<int64_t> shape(segmap.shape(), segmap.shape() + segmap.ndim());
  const int64_t batch = shape[0], channels = shape[1];
  shape.erase(shape.begin() + 1);
  Numbers codes(shape);
  require(codes.size() < INT32_MAX, "segmap has shape " + shape_text(segmap) +
                                        "; it should have fewer than 2147483647 pixels");
  int32_t* data = codes.mutable_data();
  const void* elements = segmap.data();
  const int64_t element_size = segmap.itemsize(), pixels = batch > 0 ? codes.size() / batch : 0;
  std::vector<int64_t> places;
  bool found;
  {
    const pybind11::gil_scoped_release release;
    found = find_codes(elements, element_size, batch, channels, pixels, data, &places);
  }
  if (!found) return std::nullopt;
  return std::make_tuple(codes, pybind11::array_t<int64_t>(places.size(), places.data()));
}

}  // namespace

InstructionSet instruction_set() { return in_use.load(std::memory_order_relaxed); }

}  // namespace spade_fast

PYBIND11_MODULE(_cpu, module) {
  using namespace spade_fast;
  in_use = named(instruction_sets().front());
  module.doc() = "The kernels of spade_fast for the CPU.";
  module.def("instruction_sets", &instruction_sets,
             "The kernels' instruction sets that this processor supports, best first.");
  module.def(
      "instruction_set", [] { return kNames[static_cast<int>(instruction_set())]; },
      "The instruction set that the kernels use: the best, unless another was chosen.");
  module.def(
      "find_codes", &find_codes_of,
      "The codes of a condition and the first place of each; None if it has too many codes.");
  module.def("number_windows", &number_windows_of,
             "The windows of a map [N, *spatial]: the number of each, and the contents of each.",
             pybind11::arg("map"), pybind11::arg("kernel_size"),
             pybind11::arg("hash_mask") = ~uint64_t{0});
  module.def("find_windows", &find_windows_of,
             "For each of these maps of codes below rows: the lists of its windows, those of the"
             " windows of these, index and order.");
  module.def("window_sums", &window_sums_of,
             "The contents of windows as lists of the rows to sum, in both directions.");
  module.def(
      "sort_pixels", &sort_pixels_of,
      "The pixels of each image, sorted by index [N, pixels], whose numbers are below bound.");
  module.def(
      "use_instruction_set", [](const std::string& name) { in_use = named(name); },
      "Makes the kernels use this instruction set.");
}
