// What the CPU kernels ask of their tensors: element types, memory layouts, rows, and the numbers of each plane.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "activations.h"
#include "elements.h"

namespace spade_fast {

using torch::stable::Tensor;

inline ScalarType promoted(ScalarType one, ScalarType other) {
  if (one == other) return one;
  return one == ScalarType::Double || other == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline ScalarType sum_dtype(ScalarType dtype) { return promoted(dtype, ScalarType::Float); }

template <typename Sum>
constexpr ScalarType kScalarType = sizeof(Sum) == 8 ? ScalarType::Double : ScalarType::Float;

// Calls f with a value of the type that sums over elements of dtype are held in.
template <typename F>
void dispatch_sum(ScalarType dtype, F&& f) {
  if (sum_dtype(dtype) == ScalarType::Double) return f(double());
  f(float());
}

inline Activation activation_named(const std::optional<std::string>& name) {
  if (!name) return Activation::none;
  if (*name == "relu") return Activation::relu;
  if (*name == "leaky_relu") return Activation::leaky_relu;
  if (*name == "silu") return Activation::silu;
  STD_TORCH_CHECK(false, "spade_fast: activation is ", *name, ", it should be None, relu, leaky_relu or silu");
}

// How x [N, C, *spatial] lies in memory: planes one after the other, or pixels with all their channels. A row is what lies
// together: the pixels of a plane, or the channels of a pixel.
enum class Layout { contiguous, channels_last };

// As `is_channels_last` in torch_backend.py.
inline Layout layout_of(const Tensor& x) {
  return !x.is_contiguous() && x.stride(1) == 1 ? Layout::channels_last : Layout::contiguous;
}

// The distance from row to row, if all rows of an image lie alike and have no gaps inside, else nothing. A pixel's channels may be
// the first of more (half of a joint γ‖β), and so may an image's planes.
inline std::optional<int64_t> row_distance(const Tensor& x, Layout layout) {
  const bool contiguous = layout == Layout::contiguous;
  if (!contiguous && x.size(1) != 1 && x.stride(1) != 1) return std::nullopt;
  int64_t distance = contiguous ? 1 : x.size(1), pixels = 1;
  for (int64_t dim = x.dim() - 1; dim >= 2; --dim) {
    if (x.size(dim) == 1) continue;
    if (!contiguous && pixels == 1) distance = x.stride(dim);  // from pixel to pixel, whatever it is
    if (x.stride(dim) != distance * pixels) return std::nullopt;
    pixels *= x.size(dim);
  }
  return contiguous ? x.stride(1) : distance;
}

// x itself where its rows lie alike, else a copy without gaps in the same layout.
inline Tensor with_rows(const Tensor& x, Layout layout) {
  if (row_distance(x, layout)) return x;
  if (layout == Layout::contiguous) return torch::stable::contiguous(x);
  Tensor y = x;  // contiguous with the channels behind, seen from the front again
  for (int64_t dim = 1; dim + 1 < x.dim(); ++dim) y = torch::stable::transpose(y, dim, dim + 1);
  y = torch::stable::contiguous(y);
  for (int64_t dim = x.dim() - 2; dim >= 1; --dim) y = torch::stable::transpose(y, dim, dim + 1);
  return y;
}

// An uninitialised tensor. A large one is fresh from the system each time, and the first touch of its 4 KiB pages costs three times
// what the kernels do with them: huge pages cost next to nothing.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor x = torch::stable::new_empty(like, sizes, dtype);
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(x.data_ptr()), end = start + x.numel() * x.element_size();
  const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: nothing is lost if it fails
#endif
  return x;
}

// An uninitialised tensor of x's shape without gaps in this layout, for a kernel to write.
inline Tensor new_output(const Tensor& x, Layout layout, ScalarType dtype) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  if (layout == Layout::contiguous) return new_tensor(x, sizes, dtype);
  std::rotate(sizes.begin() + 1, sizes.begin() + 2, sizes.end());
  Tensor y = new_tensor(x, sizes, dtype);
  for (int64_t dim = x.dim() - 2; dim >= 1; --dim) y = torch::stable::transpose(y, dim, dim + 1);
  return y;
}

// What a kernel wrote, with the strides of empty_like(x); a tensor of size 0 that stands for none stays one.
inline Tensor finished(const Tensor& y, const Tensor& x, Layout layout) {
  if (layout == Layout::channels_last || x.is_contiguous() || y.dim() != x.dim()) return y;
  Tensor like = torch::stable::empty_like(x);
  if (like.is_contiguous()) return y;
  if (like.scalar_type() != y.scalar_type()) like = torch::stable::to(like, y.scalar_type());
  return torch::stable::copy_(like, y);
}

// A tensor's rows, to read. With an index [N, *spatial] the tensor is a table [K, C], and each pixel's channels are the row of it
// that the index names.
template <typename Sum>
class Source {
 public:
  Source(const Tensor& x, Layout layout, const std::optional<Tensor>& index = std::nullopt)
      : owner_(index ? table(x, layout) : with_rows(x, layout)),
        layout_(layout),
        data_(static_cast<const char*>(owner_.const_data_ptr())),
        type_(owner_.scalar_type()),
        size_(owner_.element_size()),
        image_(owner_.stride(0)),
        row_(index ? owner_.stride(0) : *row_distance(owner_, layout)) {
    STD_TORCH_CHECK(type_ == ScalarType::Float || type_ == ScalarType::Double || type_ == ScalarType::BFloat16 ||
                    type_ == ScalarType::Half, "spade_fast: dtype should be float32, float64, bfloat16 or float16");
    if (!index) return;
    index_owner_.emplace(torch::stable::contiguous(*index));
    index_ = index_owner_->template const_data_ptr<int32_t>();
    pixels_ = index->size(0) == 0 ? 0 : index->numel() / index->size(0);
  }

  // The elements of row `row` of image n, from `start` on.
  Elements<Sum> at(int64_t n, int64_t row, int64_t start) const {
    if (index_ == nullptr) return {data_ + (n * image_ + row * row_ + start) * size_, type_, nullptr};
    const Sum* values = reinterpret_cast<const Sum*>(data_);
    if (layout_ == Layout::contiguous) return {values + row * row_, type_, index_ + n * pixels_ + start};
    return {values + index_[n * pixels_ + row] * row_ + start, type_, nullptr};
  }

  // What the rows of a table hold for channel c, [K], where planes are read.
  const Sum* plane_of_table(int64_t c) const { return reinterpret_cast<const Sum*>(data_) + c * row_; }

 private:
  // As Sums, for it is small; [C, K] for planes, each of which then reads from a row that stays in the cache.
  static Tensor table(const Tensor& x, Layout layout) {
    const Tensor rows = torch::stable::to(x, kScalarType<Sum>);
    if (layout == Layout::contiguous) return torch::stable::contiguous(torch::stable::transpose(rows, 0, 1));
    return rows.stride(1) == 1 ? rows : torch::stable::contiguous(rows);
  }

  Tensor owner_;
  std::optional<Tensor> index_owner_;
  Layout layout_;
  const char* data_;
  const int32_t* index_ = nullptr;
  ScalarType type_;
  int64_t size_, image_, row_, pixels_ = 0;
};

// A tensor's rows, to write; one of size 0 that stands for none has no places.
template <typename Sum>
class Target {
 public:
  Target(const Tensor& y, Layout layout) : type_(y.scalar_type()), size_(y.element_size()) {
    if (y.dim() < 3) return;
    data_ = static_cast<char*>(y.mutable_data_ptr());
    image_ = y.stride(0);
    row_ = *row_distance(y, layout);
    streams_ = y.numel() * size_ >= kStreamed;
  }

  Place<Sum> at(int64_t n, int64_t row, int64_t start) const {
    return {data_ == nullptr ? nullptr : data_ + (n * image_ + row * row_ + start) * size_, type_, streams_};
  }

 private:
  static constexpr int64_t kStreamed = 8 << 20;  // bytes: more than a core's share of the caches

  ScalarType type_;
  int64_t size_;
  char* data_ = nullptr;
  int64_t image_ = 0, row_ = 0;
  bool streams_ = false;
};

// A number of each plane (n, c), as a block sees it: the same all along a row of pixels, or one for each channel.
template <typename Sum>
struct Uniform {
  Sum value;
  ALWAYS_INLINE Sum operator[](int64_t) const { return value; }
};

template <typename Sum>
struct PerChannel {
  const Sum* values;
  ALWAYS_INLINE Sum operator[](int64_t i) const { return values[i]; }
};

// Rows of numbers [k, N, C], in Sum: planes (shift, scale, offset) or terms (constant, slope).
template <typename Sum>
class Numbers {
 public:
  explicit Numbers(const Tensor& given)
      : owner_(torch::stable::contiguous(torch::stable::to(given, kScalarType<Sum>))),
        data_(owner_.template const_data_ptr<Sum>()),
        planes_(given.size(1) * given.size(2)) {}

  Uniform<Sum> uniform(int64_t which, int64_t number) const { return {data_[which * planes_ + number]}; }
  PerChannel<Sum> per_channel(int64_t which, int64_t number) const { return {data_ + which * planes_ + number}; }

 private:
  Tensor owner_;
  const Sum* data_;
  int64_t planes_;
};

// The rows of bits that `signs` [N, rows, bytes] holds; none where its size is 0.
class Signs {
 public:
  explicit Signs(const Tensor& signs) {
    if (signs.dim() != 3) return;
    data_ = signs.mutable_data_ptr<uint8_t>();
    image_ = signs.stride(0);
    row_ = signs.stride(1);
  }

  uint8_t* at(int64_t n, int64_t row, int64_t start) const {
    return data_ == nullptr ? nullptr : data_ + n * image_ + row * row_ + start / 8;
  }

 private:
  uint8_t* data_ = nullptr;
  int64_t image_ = 0, row_ = 0;
};

}  // namespace spade_fast
