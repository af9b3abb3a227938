// What the kernels of every device ask of their tensors: dtypes, memory layouts, rows without gaps,
// and places for results.
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
                  ", it should be None, relu, leaky_relu or silu");
}

// x without gaps, and in this dtype. Where it is so already PyTorch is not asked: each time takes
// microseconds of the host.
inline Tensor without_gaps(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}
inline Tensor in_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

// How x [N, C, *spatial] lies in memory: planes one after the other, or pixels with all their
// channels. A row is what lies together: the pixels of a plane, or the channels of a pixel.
enum class Layout { contiguous, channels_last };

// As `is_channels_last` in contract.py.
inline Layout layout_of(const Tensor& x) {
  return !x.is_contiguous() && x.stride(1) == 1 ? Layout::channels_last : Layout::contiguous;
}

// The distance from row to row, if all rows of an image lie alike and have no gaps inside, else
// nothing. A pixel's channels may be the first of more (half of a joint γ‖β), and so may an image's
// planes.
inline std::optional<int64_t> row_distance(const Tensor& x, Layout layout) {
  const bool contiguous = layout == Layout::contiguous;
  if (!contiguous && x.size(1) != 1 && x.stride(1) != 1) return std::nullopt;
  int64_t distance = contiguous ? 1 : x.size(1), pixels = 1;
  for (int64_t dim = x.dim() - 1; dim >= 2; --dim) {
    if (x.size(dim) == 1) continue;
    // From pixel to pixel, whatever it is.
    if (!contiguous && pixels == 1) distance = x.stride(dim);
    if (x.stride(dim) != distance * pixels) return std::nullopt;
    pixels *= x.size(dim);
  }
  return contiguous ? x.stride(1) : distance;
}

// x with its channels behind all else, and the other way round: views.
inline Tensor channels_behind(Tensor x) {
  for (int64_t dim = 1; dim + 1 < x.dim(); ++dim) x = torch::stable::transpose(x, dim, dim + 1);
  return x;
}

inline Tensor channels_in_front(Tensor x) {
  for (int64_t dim = x.dim() - 2; dim >= 1; --dim) x = torch::stable::transpose(x, dim, dim + 1);
  return x;
}

// x itself where its rows lie alike, else a copy without gaps in the same layout.
inline Tensor with_rows(const Tensor& x, Layout layout) {
  if (row_distance(x, layout)) return x;
  if (layout == Layout::contiguous) return without_gaps(x);
  return channels_in_front(torch::stable::contiguous(channels_behind(x)));
}

// An uninitialised tensor. A large one on the CPU is fresh from the system each time, and the first
// touch of its 4 KiB pages costs three times what the kernels do with them: huge pages cost next to
// nothing.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor x = torch::stable::new_empty(like, sizes, dtype);
#if defined(MADV_HUGEPAGE)
  if (!x.is_cpu()) return x;
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(x.data_ptr()),
                  end = start + x.numel() * x.element_size();
  const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage,
                  last = end / kHugePage * kHugePage;
  // Advice: nothing is lost if it fails.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return x;
}

// An uninitialised tensor of x's shape without gaps in this layout, for a kernel to write.
inline Tensor new_output(const Tensor& x, Layout layout, ScalarType dtype) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  if (layout == Layout::contiguous) return new_tensor(x, sizes, dtype);
  std::rotate(sizes.begin() + 1, sizes.begin() + 2, sizes.end());
  return channels_in_front(new_tensor(x, sizes, dtype));
}

// Whether x's dimensions follow each other in memory as a kernel writes them: then so do those of
// empty_like(x).
inline bool is_in_order(const Tensor& x, Layout layout) {
  int64_t before = INT64_MAX;
  for (int64_t i = 0; i < x.dim(); ++i) {
    const int64_t dim = layout == Layout::contiguous || i == 0 ? i : i + 1 < x.dim() ? i + 1 : 1;
    if (x.size(dim) == 1) continue;
    if (x.stride(dim) == 0 || x.stride(dim) >= before) return false;
    before = x.stride(dim);
  }
  return true;
}

// What a kernel wrote, with the strides of empty_like(x), as the fakes in Python say; a tensor of
// size 0 that stands for none stays one.
inline Tensor finished(const Tensor& y, const Tensor& x, Layout layout) {
  if (y.dim() != x.dim() || is_in_order(x, layout)) return y;
  Tensor like = in_dtype(torch::stable::empty_like(x), y.scalar_type());
  return torch::stable::copy_(like, y);
}

}  // namespace spade_fast
