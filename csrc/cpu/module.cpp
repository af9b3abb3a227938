// The Python module spade_fast._cpu. Importing it registers the CPU kernels; itself it holds what concerns the host alone.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "codes.h"
#include "vector.h"
#include "windows.h"

namespace spade_fast {
namespace {

using Numbers = pybind11::array_t<int32_t, pybind11::array::c_style>;

Numbers as_array(const std::vector<int32_t>& values, std::vector<int64_t> shape) { return Numbers(std::move(shape), values.data()); }

std::tuple<Numbers, Numbers> number_windows_of(const Numbers& map, int64_t kernel_size, uint64_t hash_mask) {
  const std::vector<int64_t> shape(map.shape(), map.shape() + map.ndim());
  const int32_t* data = map.data();
  Numbered found;
  {
    const pybind11::gil_scoped_release release;
    found = number_windows(data, shape, kernel_size, hash_mask);
  }
  return {as_array(found.numbers, shape), as_array(found.contents, {found.windows, found.taps})};
}

std::tuple<Numbers, Numbers, Numbers, Numbers> window_sums_of(const Numbers& contents, int64_t rows) {
  const int64_t windows = contents.shape(0), taps = contents.shape(1);
  const int32_t* data = contents.data();
  std::vector<int32_t> found[4];
  {
    const pybind11::gil_scoped_release release;
    window_sums(data, windows, taps, rows, found);
  }
  const auto array = [](const std::vector<int32_t>& values) { return as_array(values, {static_cast<int64_t>(values.size())}); };
  return {array(found[0]), array(found[1]), array(found[2]), array(found[3])};
}

Numbers sort_pixels_of(const Numbers& index, int64_t bound) {
  const int64_t images = index.shape(0), pixels = index.shape(1);
  Numbers order({images, pixels});
  const int32_t* from = index.data();
  int32_t* to = order.mutable_data();
  {
    const pybind11::gil_scoped_release release;
    std::vector<int32_t> starts;
    for (int64_t n = 0; n < images; ++n) sort_by_number(from + n * pixels, pixels, bound, &starts, to + n * pixels);
  }
  return order;
}

constexpr const char* kNames[] = {"base", "avx2", "avx512"};

bool supported(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::avx2) return __builtin_cpu_supports("x86-64-v3");
  if (set == InstructionSet::avx512) return __builtin_cpu_supports("x86-64-v4");
#endif
  return set == InstructionSet::base;
}

InstructionSet named(const std::string& name) {
  for (const auto set : {InstructionSet::base, InstructionSet::avx2, InstructionSet::avx512}) {
    if (name != kNames[static_cast<int>(set)]) continue;
    if (supported(set)) return set;
    throw pybind11::value_error("SPADE_FAST_ISA is " + name + ", which this processor does not have");
  }
  throw pybind11::value_error("SPADE_FAST_ISA is " + name + ", it should be base, avx2 or avx512");
}

// The instruction sets, among those that the kernels know, that this processor runs; the best first.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto set : {InstructionSet::avx512, InstructionSet::avx2, InstructionSet::base}) {
    if (supported(set)) names.push_back(kNames[static_cast<int>(set)]);
  }
  return names;
}

std::atomic<InstructionSet> in_use{InstructionSet::base};

// Of a contiguous condition [N, L, *spatial] as numbers of its element size: codes and places, or nothing where there are too many.
std::optional<std::tuple<Numbers, pybind11::array_t<int64_t>>> find_codes_of(const pybind11::array& segmap) {
  std::vector<int64_t> shape(segmap.shape(), segmap.shape() + segmap.ndim());
  const int64_t batch = shape[0], channels = shape[1];
  shape.erase(shape.begin() + 1);
  Numbers codes(shape);
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
  const char* asked_for = std::getenv("SPADE_FAST_ISA");
  in_use = named(asked_for != nullptr && *asked_for != '\0' ? asked_for : instruction_sets().front());
  module.doc() = "The kernels of spade_fast for the CPU.";
  module.def("instruction_sets", &instruction_sets,
             "The instruction sets, among those that the kernels know, that this processor runs; the best first.");
  module.def("instruction_set", [] { return kNames[static_cast<int>(instruction_set())]; },
             "The one that the kernels use: the best, or what the environment variable SPADE_FAST_ISA says at import.");
  module.def("find_codes", &find_codes_of, "The codes of a condition, and the first place of each; None where it has too many.");
  module.def("number_windows", &number_windows_of, "The windows of a map [N, *spatial]: their numbers, and what each sees.",
             pybind11::arg("map"), pybind11::arg("kernel_size"), pybind11::arg("hash_mask") = ~uint64_t{0});
  module.def("window_sums", &window_sums_of, "What windows of so many rows see, as lists for sums over rows.");
  module.def("sort_pixels", &sort_pixels_of, "The pixels of each image [N, pixels], sorted by numbers below a bound.");
  module.def("use_instruction_set", [](const std::string& name) { in_use = named(name); }, "Makes the kernels use this one.");
}
