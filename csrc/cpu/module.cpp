// The Python module spade_fast._cpu. Importing it registers the CPU kernels; itself it holds what concerns the host alone.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace {

// The instruction sets, among those that the kernels know, that this processor runs; the best first.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v4")) names.push_back("avx512");
  if (__builtin_cpu_supports("x86-64-v3")) names.push_back("avx2");
#endif
  names.push_back("base");
  return names;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "The kernels of spade_fast for the CPU.";
  module.def("instruction_sets", &instruction_sets,
             "The instruction sets, among those that the kernels know, that this processor runs; the best first.");
}
