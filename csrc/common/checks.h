// Checks of every operator's operands (shapes, dtypes, devices) before anything runs: one function
// for each operator, shared by all devices. The values in an index or a list are checked on the CPU
// only (csrc/cpu/ranges.h), because a GPU would have to synchronise for it.
#pragma once

#include <initializer_list>

#include "tensors.h"

namespace spade_fast {

inline std::string text(SizeList sizes) {
  std::string found = "[";
  for (size_t i = 0; i < sizes.size(); ++i) found += (i ? ", " : "") + std::to_string(sizes[i]);
  return found + "]";
}

inline std::string text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

using Dtypes = std::initializer_list<ScalarType>;

inline constexpr Dtypes kFloating = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                                     ScalarType::Double};
inline constexpr Dtypes kWhole = {ScalarType::Int};

inline void check_dtype(const Tensor& given, const char* name, Dtypes dtypes) {
  const ScalarType dtype = given.scalar_type();
  if (std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end()) return;
  std::string wanted;
  for (const ScalarType& one : dtypes) {
    wanted += (&one == dtypes.begin() ? "" : &one + 1 == dtypes.end() ? " or " : ", ") + text(one);
  }
  STD_TORCH_CHECK(false, "spade_fast: ", name, " has dtype ", text(dtype), "; it should be ",
                  wanted);
}

inline void check_device(const Tensor& given, const char* name, const Tensor& other) {
  if (given.is_cpu() && other.is_cpu()) return;
  STD_TORCH_CHECK(
      given.is_cpu() == other.is_cpu() && given.is_cuda() == other.is_cuda() &&
          given.get_device_index() == other.get_device_index(),
      "spade_fast: ", name,
      " is on a different device from the other operands; it should be on the same one");
}

inline void check_shape(const Tensor& given, const char* name, SizeList sizes,
                        const char* meaning) {
  const SizeList own = given.sizes();
  STD_TORCH_CHECK(std::equal(own.begin(), own.end(), sizes.begin(), sizes.end()),
                  "spade_fast: ", name, " has shape ", text(own), "; it should be ", text(sizes),
                  " (", meaning, ")");
}

// Checks device, dtype and shape of an operand; `other` is known to be on the right device.
inline void check_operand(const Tensor& given, const char* name, const Tensor& other, Dtypes dtypes,
                          SizeList sizes, const char* meaning) {
  check_device(given, name, other);
  check_dtype(given, name, dtypes);
  check_shape(given, name, sizes, meaning);
}

// The product of sizes; refuses one beyond `bound`, the largest that the kernels can count.
inline int64_t product(const Tensor& given, const char* name, std::initializer_list<int64_t> sizes,
                       int64_t bound = INT64_MAX) {
  int64_t found = 1;
  bool fits = true;
  for (const int64_t size : sizes) fits = !__builtin_mul_overflow(found, size, &found) && fits;
  STD_TORCH_CHECK(fits && found <= bound, "spade_fast: ", name, " has shape ", text(given.sizes()),
                  ", which is too large for the kernels to index");
  return found;
}

// N, C and the number of pixels of x [N, C, *spatial].
struct Extent {
  int64_t images, channels, pixels = 1;
};

// Checks x, for every operator.
inline Extent check_features(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 3 && x.dim() <= 5, "spade_fast: x has shape ", text(x.sizes()),
                  "; it should be [N, C, *spatial] with one to three spatial dimensions");
  check_dtype(x, "x", kFloating);
  Extent extent = {x.size(0), x.size(1)};
  for (int64_t dim = 2; dim < x.dim(); ++dim)
    extent.pixels = product(x, "x", {extent.pixels, x.size(dim)});
  product(x, "x",
          {std::max<int64_t>(1, extent.images), std::max<int64_t>(1, extent.channels),
           std::max<int64_t>(1, extent.pixels), 64});
  return extent;
}

// Checks x, γ, β and index, for every operator that modulates. β may be missing unless
// `needs_beta`.
inline Extent check_modulation(const Tensor& x, const Tensor& gamma,
                               const std::optional<Tensor>& beta,
                               const std::optional<Tensor>& index, bool needs_beta) {
  const Extent extent = check_features(x);
  if (index) {
    std::vector<int64_t> places(x.sizes().begin(), x.sizes().end());
    places.erase(places.begin() + 1);
    check_operand(*index, "index", x, kWhole, places, "[N, *spatial]");
    check_device(gamma, "gamma", x);
    check_dtype(gamma, "gamma", kFloating);
    STD_TORCH_CHECK(gamma.dim() == 2 && gamma.size(1) == extent.channels,
                    "spade_fast: gamma has shape ", text(gamma.sizes()), "; it should be [K, ",
                    extent.channels, "] (a table, because index is given)");
    STD_TORCH_CHECK(gamma.size(0) > 0 || index->numel() == 0, "spade_fast: gamma has shape ",
                    text(gamma.sizes()),
                    "; it should be a table with a row for every number in index");
    product(gamma, "gamma", {gamma.size(0)}, INT32_MAX);
    product(*index, "index", {extent.pixels}, INT32_MAX);
  } else {
    check_operand(gamma, "gamma", x, kFloating, x.sizes(), "x's shape");
  }
  STD_TORCH_CHECK(
      beta || !needs_beta,
      "spade_fast: beta is None; it should be a tensor: the derivative of silu needs it");
  if (beta)
    check_operand(*beta, "beta", gamma, {gamma.scalar_type()}, gamma.sizes(), "gamma's shape");
  return extent;
}

// Checks an array of `count` values per plane: [count, N, C].
inline void check_numbers(const Tensor& given, const char* name, const Tensor& x, int64_t count) {
  check_operand(given, name, x, {sum_dtype(x.scalar_type())},
                std::vector<int64_t>{count, x.size(0), x.size(1)}, "values per plane");
}

inline void check_apply(const Tensor& x, const Tensor& planes, const Tensor& gamma,
                        const Tensor& beta, const std::optional<Tensor>& index) {
  check_modulation(x, gamma, beta, index, true);
  check_numbers(planes, "planes", x, 3);
}

// Checks a number for each channel, if there are any.
inline void check_channels(const std::optional<Tensor>& given, const char* name, const Tensor& x) {
  if (given)
    check_operand(*given, name, x, kFloating, std::vector<int64_t>{x.size(1)},
                  "a number for each channel");
}

inline Extent check_running_planes(const Tensor& x, const Tensor& mean, const Tensor& variance,
                                   const std::optional<Tensor>& weight,
                                   const std::optional<Tensor>& bias) {
  const Extent extent = check_features(x);
  check_channels(mean, "mean", x), check_channels(variance, "variance", x);
  check_channels(weight, "weight", x), check_channels(bias, "bias", x);
  return extent;
}

inline Extent check_batch_planes(const Tensor& x, const Tensor& moments,
                                 const std::optional<Tensor>& weight,
                                 const std::optional<Tensor>& bias) {
  const Extent extent = check_features(x);
  check_numbers(moments, "moments", x, 2);
  check_channels(weight, "weight", x), check_channels(bias, "bias", x);
  return extent;
}

inline Extent check_batch_terms(const Tensor& x, const Tensor& sums,
                                const Tensor& inverse_deviation,
                                const std::optional<Tensor>& weight) {
  const Extent extent = check_features(x);
  check_numbers(sums, "sums", x, 2);
  check_operand(inverse_deviation, "inverse_deviation", x, {sum_dtype(x.scalar_type())},
                std::vector<int64_t>{1, extent.channels}, "a number for each channel");
  check_channels(weight, "weight", x);
  return extent;
}

inline void check_out(const Tensor& out, const Tensor& x, const Tensor& gamma) {
  check_operand(out, "out", x, {promoted(x.scalar_type(), gamma.scalar_type())}, x.sizes(),
                "x's shape");
  const Tensor rows = layout_of(x) == Layout::channels_last ? channels_behind(out) : out;
  STD_TORCH_CHECK(rows.is_contiguous(), "spade_fast: out has strides ", text(out.strides()),
                  "; it should be dense and in the same memory format as x, which has strides ",
                  text(x.strides()));
}

inline void check_signs(const Tensor& signs, const Tensor& x, const Extent& extent,
                        Activation activation) {
  const bool last = layout_of(x) == Layout::channels_last, keeps = keeps_signs(activation);
  const int64_t rows = last ? extent.pixels : extent.channels,
                length = last ? extent.channels : extent.pixels;
  const std::vector<int64_t> shape =
      keeps ? std::vector<int64_t>{extent.images, rows, (length + 7) / 8} : std::vector<int64_t>{0};
  check_operand(signs, "signs", x, {ScalarType::Byte}, shape,
                keeps ? "a bit per element" : "the activation needs no signs");
}

// The checks that both backward operators share.
inline Extent check_backward(const Tensor& dy, const Tensor& x, const Tensor& planes,
                             const Tensor& gamma, const std::optional<Tensor>& beta,
                             const std::optional<Tensor>& index, const Tensor& signs,
                             Activation activation) {
  const Extent extent = check_modulation(x, gamma, beta, index, activation == Activation::silu);
  check_operand(dy, "dy", x, {promoted(x.scalar_type(), gamma.scalar_type())}, x.sizes(),
                "x's shape");
  check_numbers(planes, "planes", x, 3);
  check_signs(signs, x, extent, activation);
  return extent;
}

inline void check_order(const std::optional<Tensor>& order, const Tensor& x,
                        const std::optional<Tensor>& index, const Extent& extent) {
  if (!index) return;
  STD_TORCH_CHECK(order,
                  "spade_fast: order is None; it should be the sorted pixels [N, pixels], because "
                  "index is given");
  check_operand(*order, "order", x, kWhole, std::vector<int64_t>{extent.images, extent.pixels},
                "[N, pixels]");
}

inline void check_backward_input(const Tensor& dy, const Tensor& x, const Tensor& planes,
                                 const Tensor& gamma, const std::optional<Tensor>& beta,
                                 const std::optional<Tensor>& index, const Tensor& signs,
                                 const std::optional<Tensor>& terms, Activation activation) {
  check_backward(dy, x, planes, gamma, beta, index, signs, activation);
  if (terms) check_numbers(*terms, "terms", x, 2);
}

inline void check_backward_sums(const Tensor& dy, const Tensor& x, const Tensor& planes,
                                const Tensor& gamma, const std::optional<Tensor>& beta,
                                const std::optional<Tensor>& index,
                                const std::optional<Tensor>& order, const Tensor& signs,
                                Activation activation) {
  check_order(order, x, index,
              check_backward(dy, x, planes, gamma, beta, index, signs, activation));
}

// Checks lists of row numbers; `other` is known to be on the right device.
inline void check_lists(const Tensor& offsets, const Tensor& listed, const Tensor& other) {
  for (const auto& [list, name] : {std::pair(&offsets, "offsets"), std::pair(&listed, "listed")}) {
    check_operand(*list, name, other, kWhole, std::vector<int64_t>{list->numel()}, "a list");
    product(*list, name, {list->numel()}, INT32_MAX);
  }
  STD_TORCH_CHECK(
      offsets.numel() > 0,
      "spade_fast: offsets has shape [0]; it should have one entry more than there are lists");
}

inline void check_sum_lists(const Tensor& x, const Tensor& offsets, const Tensor& listed) {
  STD_TORCH_CHECK(x.dim() == 2, "spade_fast: x has shape ", text(x.sizes()),
                  "; it should be [rows, columns]");
  check_dtype(x, "x", kFloating);
  check_lists(offsets, listed, x);
  for (const int64_t rows : {x.size(0), offsets.numel()})
    product(x, "x", {std::max<int64_t>(1, rows), std::max<int64_t>(1, x.size(1)), 1024});
}

// Several convolutions of the same rows as one: their outputs together, and the sizes that they
// share.
struct Convolution {
  int64_t outputs, channels, taps;
};

// Checks the weights and the lists of an operator that convolves at windows; `other` is known to be
// on the right device and to have the right dtype. `given` has a tensor for each weight.
template <typename Given>
Convolution check_convolution(const std::vector<Tensor>& weights, const Given& given,
                              const char* name, const Tensor& other, const Tensor& offsets,
                              const Tensor& listed) {
  STD_TORCH_CHECK(!weights.empty() && weights.size() == given.size(), "spade_fast: ", name,
                  " has length ", given.size(), " and weights has length ", weights.size(),
                  "; they should have the same length, at least 1");
  const Tensor& first = weights[0];
  Convolution found = {};
  for (const Tensor& weight : weights) {
    check_device(weight, "weights", other);
    check_dtype(weight, "weights", {other.scalar_type()});
    STD_TORCH_CHECK(weight.dim() >= 3, "spade_fast: weights has shape ", text(weight.sizes()),
                    "; it should be [out, in, *kernel]");
    std::vector<int64_t> sizes(first.sizes().begin(), first.sizes().end());
    sizes[0] = weight.size(0);
    check_shape(weight, "weights", sizes, "like the first weight");
    found.outputs += product(weight, "weights", {weight.size(0)}, INT32_MAX);
  }
  found.channels = first.size(1), found.taps = 1;
  for (int64_t dim = 2; dim < first.dim(); ++dim)
    found.taps = product(first, "weights", {found.taps, first.size(dim)}, INT32_MAX);
  STD_TORCH_CHECK(found.taps > 0, "spade_fast: weights has shape ", text(first.sizes()),
                  "; it should be [out, in, *kernel] with at least one tap");
  product(first, "weights",
          {found.taps, std::max<int64_t>(1, found.outputs), std::max<int64_t>(1, found.channels),
           1024});
  check_lists(offsets, listed, other);
  return found;
}

inline Convolution check_convolve_windows(const Tensor& rows, const std::vector<Tensor>& weights,
                                          const std::vector<std::optional<Tensor>>& biases,
                                          const Tensor& offsets, const Tensor& listed) {
  check_dtype(rows, "rows", kFloating);
  const Convolution found = check_convolution(weights, biases, "biases", rows, offsets, listed);
  for (size_t i = 0; i < weights.size(); ++i) {
    if (biases[i])
      check_operand(*biases[i], "biases", rows, {rows.scalar_type()},
                    std::vector<int64_t>{weights[i].size(0)}, "[out]");
  }
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) == found.channels, "spade_fast: rows has shape ",
                  text(rows.sizes()), "; it should have two dimensions, the second of size ",
                  found.channels);
  product(rows, "rows", {rows.size(0), found.taps}, INT32_MAX);
  return found;
}

// For the gradients: the lists are of the windows that see each row through each tap.
inline Convolution check_convolve_windows_rows(const std::vector<Tensor>& gradients,
                                               const std::vector<Tensor>& weights,
                                               const Tensor& back_offsets,
                                               const Tensor& back_listed) {
  STD_TORCH_CHECK(!gradients.empty(),
                  "spade_fast: gradients has length 0; it should have a tensor for each weight");
  const Tensor& first = gradients[0];
  check_dtype(first, "gradients", kFloating);
  const Convolution found =
      check_convolution(weights, gradients, "gradients", first, back_offsets, back_listed);
  const int64_t windows = first.dim() == 0 ? 0 : first.size(0);
  for (size_t i = 0; i < weights.size(); ++i)
    check_operand(gradients[i], "gradients", first, {first.scalar_type()},
                  std::vector<int64_t>{windows, weights[i].size(0)}, "[windows, out]");
  STD_TORCH_CHECK((back_offsets.numel() - 1) % found.taps == 0, "spade_fast: offsets has shape ",
                  text(back_offsets.sizes()), "; it should have rows * ", found.taps,
                  " + 1 entries, with ", found.taps, " taps");
  return found;
}

inline Convolution check_convolve_windows_weights(const std::vector<Tensor>& gradients,
                                                  const Tensor& rows,
                                                  const std::vector<Tensor>& weights,
                                                  const Tensor& back_offsets,
                                                  const Tensor& back_listed) {
  const Convolution found =
      check_convolve_windows_rows(gradients, weights, back_offsets, back_listed);
  check_operand(rows, "rows", gradients[0], {gradients[0].scalar_type()},
                std::vector<int64_t>{(back_offsets.numel() - 1) / found.taps, found.channels},
                "[rows, in]");
  return found;
}

}  // namespace spade_fast
