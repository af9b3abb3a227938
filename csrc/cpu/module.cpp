// The Python module spade_fast._cpu. Importing it registers the CPU kernels; itself it holds what concerns the host alone.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "vector.h"

namespace spade_fast {
namespace {

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
  module.def("use_instruction_set", [](const std::string& name) { in_use = named(name); }, "Makes the kernels use this one.");
}
