// What every CPU kernel asks of its tensors: element types, memory layouts, sizes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <type_traits>
#include <vector>

namespace spade_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What sums over elements of T are held in.
template <typename T>
using sum_type = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType sum_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// Calls f with a value of the C++ type of dtype.
template <typename F>
void dispatch(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::BFloat16: return f(BFloat16());
    case ScalarType::Half: return f(Half());
    default: STD_TORCH_CHECK(false, "spade_fast: dtype should be float32, float64, bfloat16 or float16");
  }
}

// How x [N, C, *spatial] lies in memory: planes one after the other, or pixels with all their channels.
enum class Layout { contiguous, channels_last };

// As `is_channels_last` in torch_backend.py.
inline Layout layout_of(const Tensor& x) {
  return !x.is_contiguous() && x.stride(1) == 1 ? Layout::channels_last : Layout::contiguous;
}

inline int64_t pixels_of(const Tensor& x) {
  int64_t pixels = 1;
  for (int64_t dim = 2; dim < x.dim(); ++dim) pixels *= x.size(dim);
  return pixels;
}

// Whether x has no gaps in this layout.
inline bool is_dense(const Tensor& x, Layout layout) {
  if (layout == Layout::contiguous) return x.is_contiguous();
  int64_t expected = x.size(1);
  for (int64_t dim = x.dim() - 1; dim >= 2; --dim) {
    if (x.size(dim) != 1 && x.stride(dim) != expected) return false;
    expected *= x.size(dim);
  }
  return x.size(0) == 1 || x.stride(0) == expected;
}

// x itself where it has no gaps, else a copy in the same layout.
inline Tensor dense(const Tensor& x, Layout layout) {
  if (is_dense(x, layout)) return x;
  if (layout == Layout::contiguous) return torch::stable::contiguous(x);
  // Channels last in any number of dimensions: contiguous with the channels behind, seen from the front again.
  Tensor y = x;
  for (int64_t dim = 1; dim + 1 < x.dim(); ++dim) y = torch::stable::transpose(y, dim, dim + 1);
  y = torch::stable::contiguous(y);
  for (int64_t dim = x.dim() - 2; dim >= 1; --dim) y = torch::stable::transpose(y, dim, dim + 1);
  return y;
}

}  // namespace spade_fast
