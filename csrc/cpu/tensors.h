// The CPU kernels' views of their operands: the rows of tensors and tables, the numbers of each
// plane, and signs.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>

#include "../common/checks.h"
#include "activations.h"
#include "elements.h"
#include "ranges.h"
#include "tiles.h"

namespace spade_fast {

template <typename Sum>
constexpr ScalarType kScalarType = sizeof(Sum) == 8 ? ScalarType::Double : ScalarType::Float;

// Calls f with a value of the accumulation type for elements of dtype.
template <typename F>
void dispatch_sum(ScalarType dtype, F&& f) {
  if (sum_dtype(dtype) == ScalarType::Double) return f(double());
  f(float());
}

// A tensor's numbers one after another, converted to Sum; none if there is no tensor.
template <typename Sum>
class Flat {
 public:
  explicit Flat(const std::optional<Tensor>& given) {
    if (!given) return;
    owner_.emplace(without_gaps(in_dtype(*given, kScalarType<Sum>)));
    data_ = owner_->template const_data_ptr<Sum>();
  }

  explicit operator bool() const { return owner_.has_value(); }
  Sum operator[](int64_t i) const { return data_[i]; }

 private:
  std::optional<Tensor> owner_;
  const Sum* data_ = nullptr;
};

// Refuses numbers that are out of range for what they address: `index` the rows of a table, `order`
// pixels.
inline void check_range(const Tensor& given, const char* name, int64_t bound) {
  const Tensor numbers = without_gaps(given);
  const std::string wrong =
      out_of_range(name, numbers.const_data_ptr<int32_t>(), numbers.numel(), 0, bound);
  STD_TORCH_CHECK(wrong.empty(), wrong);
}

inline void check_index(const std::optional<Tensor>& index, const Tensor& gamma) {
  if (index) check_range(*index, "index", gamma.size(0));
}

// A tensor's rows, for reading. With an index [N, *spatial] the tensor is a table [K, C], and the
// channels of a pixel are the table's row that the index gives.
template <typename Sum>
class Source {
 public:
  Source(const Tensor& x, Layout layout, const std::optional<Tensor>& index = std::nullopt)
      : owner_(index ? table(x) : with_rows(x, layout)),
        layout_(layout),
        data_(static_cast<const char*>(owner_.const_data_ptr())),
        type_(owner_.scalar_type()),
        size_(owner_.element_size()),
        image_(owner_.stride(0)),
        row_(index ? owner_.stride(0) : *row_distance(owner_, layout)),
        channels_(x.size(1)) {
    if (!index) return;
    index_owner_.emplace(without_gaps(*index));
    index_ = index_owner_->template const_data_ptr<int32_t>();
    pixels_ = index->size(0) == 0 ? 0 : index->numel() / index->size(0);
  }

  bool is_table() const { return index_ != nullptr; }

  // The table's rows from channel c on, for the pixels of image n.
  Table<Sum> rows(int64_t n, int64_t c) const {
    return {reinterpret_cast<const Sum*>(data_) + c, row_, index_ + n * pixels_};
  }

  // The elements of row `row` of image n from `start` on. A table has them by pixel only.
  Elements<Sum> at(int64_t n, int64_t row, int64_t start) const {
    if (is_table()) return {rows(n, start).at(row), type_};
    return {data_ + (n * image_ + row * row_ + start) * size_, type_};
  }

  // Fetches a block into the cache. (Inlined, because calls of a function without effects are
  // dropped.)
  ALWAYS_INLINE void prefetch(int64_t n, int64_t row, int64_t start) const {
    const char* from = data_ + (n * image_ + row * row_ + start) * size_;
    for (int64_t i = 0; i < kBlock * size_; i += 64) __builtin_prefetch(from + i);
  }

  // Whether the rows are planes, but those of its table are pixels.
  bool needs_tiles() const { return is_table() && layout_ == Layout::contiguous; }

  void look_up(int64_t n, int64_t c, int64_t start, Sum* tile) const {
    in_vectors<LookUp, Sum>(rows(n, c), start, std::min(kTile, pixels_ - start),
                            std::min(kUnit<Sum>, channels_ - c), tile);
  }

 private:
  // Converts the table, which is small, to Sum.
  static Tensor table(const Tensor& x) {
    const Tensor rows = in_dtype(x, kScalarType<Sum>);
    return rows.stride(1) == 1 ? rows : without_gaps(rows);
  }

  Tensor owner_;
  std::optional<Tensor> index_owner_;
  Layout layout_;
  const char* data_;
  const int32_t* index_ = nullptr;
  ScalarType type_;
  int64_t size_, image_, row_, channels_, pixels_ = 0;
};

// A source's rows as one task reads them. Rows that are planes of a table are looked up tile by
// tile.
template <typename Sum>
class Reader {
 public:
  explicit Reader(const Source<Sum>& source) : source_(source) {}

  // The elements of row `row` of image n from `start` on, valid until the next call.
  Elements<Sum> at(int64_t n, int64_t row, int64_t start) {
    if (!source_.needs_tiles()) return source_.at(n, row, start);
    const int64_t c = row % kUnit<Sum>, p = start % kTile;
    const std::array<int64_t, 3> place = {n, row - c, start - p};
    if (place != held_) {
      if (!tile_) tile_.reset(new Sum[kUnit<Sum> * kTileRow<Sum>]);
      source_.look_up(n, row - c, start - p, tile_.get());
      held_ = place;
    }
    return {tile_.get() + c * kTileRow<Sum> + p, kScalarType<Sum>};
  }

 private:
  const Source<Sum>& source_;
  std::array<int64_t, 3> held_ = {-1};
  std::unique_ptr<Sum[]> tile_;  // a std::vector would be filled with zeros first
};

// A tensor's rows, for writing. A tensor of size 0 stands for none.
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

  Destination<Sum> at(int64_t n, int64_t row, int64_t start) const {
    return {data_ == nullptr ? nullptr : data_ + (n * image_ + row * row_ + start) * size_, type_,
            streams_};
  }

 private:
  static constexpr int64_t kStreamed = 8 << 20;  // bytes, more than a core's share of the caches

  ScalarType type_;
  int64_t size_;
  char* data_ = nullptr;
  int64_t image_ = 0, row_ = 0;
  bool streams_ = false;
};

// A number per plane (n, c) as a block reads it: the same for all elements of a row of pixels, or
// one for each channel.
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

// Numbers per plane [k, N, C], converted to Sum: planes (shift, scale, offset) or terms (constant,
// slope).
template <typename Sum>
class Numbers {
 public:
  explicit Numbers(const Tensor& given)
      : owner_(without_gaps(in_dtype(given, kScalarType<Sum>))),
        data_(owner_.template const_data_ptr<Sum>()),
        planes_(given.size(1) * given.size(2)) {}

  Uniform<Sum> uniform(int64_t which, int64_t number) const {
    return {data_[which * planes_ + number]};
  }
  PerChannel<Sum> per_channel(int64_t which, int64_t number) const {
    return {data_ + which * planes_ + number};
  }

 private:
  Tensor owner_;
  const Sum* data_;
  int64_t planes_;
};

// The rows of the packed bits `signs` [N, rows, bytes]; a tensor of size 0 stands for none.
class Signs {
 public:
  explicit Signs(const Tensor& signs) : owner_(without_gaps(signs)) {
    if (signs.dim() != 3) return;
    data_ = owner_.mutable_data_ptr<uint8_t>();
    image_ = owner_.stride(0);
    row_ = owner_.stride(1);
  }

  uint8_t* at(int64_t n, int64_t row, int64_t start) const {
    return data_ == nullptr ? nullptr : data_ + n * image_ + row * row_ + start / 8;
  }

  ALWAYS_INLINE void prefetch(int64_t n, int64_t row, int64_t start) const {
    if (data_ != nullptr) __builtin_prefetch(at(n, row, start), 1);
  }

 private:
  Tensor owner_;
  uint8_t* data_ = nullptr;
  int64_t image_ = 0, row_ = 0;
};

}  // namespace spade_fast
