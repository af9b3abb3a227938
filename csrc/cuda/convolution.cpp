// The operators of contract.py for the convolution at windows, for CUDA: from tensors to what the kernels are given.

#include "../common/checks.h"
#include "lists.h"
#include "on_device.h"

namespace spade_fast {
namespace {

bool aligned(const Tensor& x) {
  return (reinterpret_cast<uintptr_t>(x.const_data_ptr()) | x.stride(0) * x.element_size() | x.size(1) * x.element_size()) % 16 == 0;
}

// A matrix whose rows have no gaps inside.
Tensor with_whole_rows(const Tensor& x) { return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x); }

Rows rows_of(const Tensor& x, const char* name) {
  return {static_cast<char*>(const_cast<void*>(x.const_data_ptr())), 0, x.stride(0), type_of(x, name)};
}

// Contiguous offsets and numbers.
Lists lists_of(const Tensor& offsets, const Tensor& listed) {
  return {offsets.const_data_ptr<int32_t>(), listed.const_data_ptr<int32_t>(), offsets.numel() - 1, listed.numel()};
}

Tensor sum_lists_of(const Tensor& given_x, const Tensor& given_offsets, const Tensor& given_listed) {
  check_sum_lists(given_x, given_offsets, given_listed);
  const OnDevice on_device(given_x);
  const Tensor x = with_whole_rows(given_x);
  const Tensor offsets = torch::stable::contiguous(given_offsets), listed = torch::stable::contiguous(given_listed);
  ListSums s = {};
  s.lists = lists_of(offsets, listed);
  s.x = rows_of(x, "x"), s.rows = x.size(0), s.columns = x.size(1);
  const Tensor sums = torch::stable::new_empty(x, {s.lists.count, s.columns});
  s.sums = rows_of(sums, "sums");
  s.vector = aligned(x) && aligned(sums);
  s.pieces = pieces_of(s.lists);
  const Tensor parts = torch::stable::new_empty(x, {2 * s.pieces, s.columns}, ScalarType::Float);
  const Tensor begun = torch::stable::new_empty(x, {s.pieces}, ScalarType::Int);
  s.parts = parts.mutable_data_ptr<float>(), s.begun = begun.mutable_data_ptr<int32_t>();
  if (sums.numel() > 0) sum_lists(on_device.stream(), s);
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SPADE_FAST_NAMESPACE, SPADE_FAST_DISPATCH_KEY, library) {
  library.impl("sum_lists", TORCH_BOX(&sum_lists_of));
}

}  // namespace spade_fast
