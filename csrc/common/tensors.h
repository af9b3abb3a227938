// Helpers for tensors that the operators of every device share: dtypes, memory layouts, dense rows,
// and outputs.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "activation.h"

namespace spade_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using SizeList = torch::headeronly::IntHeaderOnlyArrayRef;

inline ScalarType promoted(ScalarType one, ScalarType other) {
  if (one == other) return one;
  return one == ScalarType::Double || other == ScalarType::Double ? ScalarType::Double
                                                                  : ScalarType::Float;
}

inline ScalarType sum_dtype(ScalarType dtype) { return promoted(dtype, ScalarType::Float); }

inline Activation activation_named(const std::optional<std::string>& name) {
  if (!name) return Activation::none;
  if (*name == "relu") return Activation::relu;
  if (*name == "leaky_relu") return Activation::leaky_relu;
  if (*name == "silu") return Activation::silu;
  STD_TORCH_CHECK(false, "spade_fast: activation is ", *name,
                  "; it should be None, relu, leaky_relu or silu");
}

// x contiguous, and x in a dtype. The checks come first because each call into PyTorch takes
// microseconds of the host, even if there is nothing to do.
inline Tensor without_gaps(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}
inline Tensor in_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

// How x [N, C, *spatial] lies in memory: plane after plane, or pixel after pixel with all channels.
// A row is a contiguous run: the pixels of a plane, or the channels of a pixel.
enum class Layout { contiguous, channels_last };

// The same rule as `is_channels_last` in contract.py.
inline Layout layout_of(const Tensor& x) {
  return !x.is_contiguous() && x.stride(1) == 1 ? Layout::channels_last : Layout::contiguous;
}

// The distance from one row to the next, in elements, if it is the same for all rows of an image
// and rows have no gaps inside; else nullopt. The channels of a pixel, or the planes of an image,
// may be a slice of a larger tensor (half of a joint γ‖β).
inline std::optional<int64_t> row_distance(const Tensor& x, Layout layout) {
  const bool contiguous = layout == Layout::contiguous;
  if (!contiguous && x.size(1) != 1 && x.stride(1) != 1) return std::nullopt;
  int64_t distance = contiguous ? 1 : x.size(1), pixels = 1;
  for (int64_t dim = x.dim() - 1; dim >= 2; --dim) {
    if (x.size(dim) == 1) continue;
    // The innermost spatial stride may be anything; the others must follow from it.
    if (!contiguous && pixels == 1) distance = x.stride(dim);
    if (x.stride(dim) != distance * pixels) return std::nullopt;
    pixels *= x.size(dim);
  }
  return contiguous ? x.stride(1) : distance;
}

// Views of x with the channels moved to the last dimension, and back to the second.
inline Tensor channels_behind(Tensor x) {
  for (int64_t dim = 1; dim + 1 < x.dim(); ++dim) x = torch::stable::transpose(x, dim, dim + 1);
  return x;
}

inline Tensor channels_in_front(Tensor x) {
  for (int64_t dim = x.dim() - 2; dim >= 1; --dim) x = torch::stable::transpose(x, dim, dim + 1);
  return x;
}

// x itself if row_distance is defined for it, else a dense copy in the same layout.
inline Tensor with_rows(const Tensor& x, Layout layout) {
  if (row_distance(x, layout)) return x;
  if (layout == Layout::contiguous) return without_gaps(x);
  return channels_in_front(torch::stable::contiguous(channels_behind(x)));
}

// An uninitialised tensor with these strides, on the device of `like`. It is made without PyTorch's
// dispatcher, which finds operators by name: instance_forward, which makes three of them, then
// takes the host 9.9 µs in place of 13.4.
//
// On the CPU the system hands out fresh pages for each large tensor, and faulting them in 4 KiB at
// a time costs three times as much as the kernels' own work. With huge pages it costs next to
// nothing.
inline Tensor new_strided(const Tensor& like, SizeList sizes, SizeList strides, ScalarType dtype) {
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device,
      like.get_device_index(), &handle));
  Tensor x(handle);
#if defined(MADV_HUGEPAGE)
  if (!x.is_cpu()) return x;
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(x.data_ptr()),
                  end = start + x.numel() * x.element_size();
  const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage,
                  last = end / kHugePage * kHugePage;
  // Only a hint: if it fails, nothing is lost.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return x;
}

// The strides of a tensor of these sizes whose dimensions lie in this order, the innermost last.
template <typename Order>
std::vector<int64_t> strides_of(SizeList sizes, Order order) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (int64_t i = sizes.size() - 1; i >= 0; --i) {
    strides[order(i)] = stride;
    stride *= std::max<int64_t>(1, sizes[order(i)]);
  }
  return strides;
}

// An uninitialised contiguous tensor on the device of `like`.
inline Tensor new_tensor(const Tensor& like, SizeList sizes, ScalarType dtype) {
  return new_strided(like, sizes, strides_of(sizes, [](int64_t i) { return i; }), dtype);
}

// The dimension of x at place i of its memory, the outermost first.
inline int64_t dimension_at(int64_t i, int64_t dims, Layout layout) {
  return layout == Layout::contiguous || i == 0 ? i : i + 1 < dims ? i + 1 : 1;
}

// An uninitialised dense tensor of x's shape in this layout, for a kernel to write.
inline Tensor new_output(const Tensor& x, Layout layout, ScalarType dtype) {
  const auto order = [&](int64_t i) { return dimension_at(i, x.dim(), layout); };
  return new_strided(x, x.sizes(), strides_of(x.sizes(), order), dtype);
}

// Whether x's strides order its dimensions as a kernel's output has them, so that empty_like(x) has
// the output's strides.
inline bool is_in_order(const Tensor& x, Layout layout) {
  int64_t before = INT64_MAX;
  for (int64_t i = 0; i < x.dim(); ++i) {
    const int64_t dim = dimension_at(i, x.dim(), layout);
    if (x.size(dim) == 1) continue;
    if (x.stride(dim) == 0 || x.stride(dim) >= before) return false;
    before = x.stride(dim);
  }
  return true;
}

// A kernel's output with the strides of empty_like(x), as the fakes in Python promise. A tensor of
// size 0 that stands for none is returned unchanged.
inline Tensor finished(const Tensor& y, const Tensor& x, Layout layout) {
  if (y.dim() != x.dim() || is_in_order(x, layout)) return y;
  Tensor like = in_dtype(torch::stable::empty_like(x), y.scalar_type());
  return torch::stable::copy_(like, y);
}

}  // namespace spade_fast
