// The operators of contract.py for the convolution at windows on CUDA: checks, outputs and
// workspaces, and the kernels' arguments.

#include "../common/checks.h"
#include "lists.h"
#include "on_device.h"
#include "windows.h"

namespace spade_fast {
namespace {

constexpr int64_t kMostTaps = 343;  // a window's row numbers are held in shared memory

bool aligned(const Tensor& x) {
  return (reinterpret_cast<uintptr_t>(x.const_data_ptr()) | x.stride(0) * x.element_size() |
          x.size(1) * x.element_size()) %
             16 ==
         0;
}

// x, or a copy of it, with contiguous rows.
Tensor with_whole_rows(const Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : without_gaps(x);
}

Rows rows_of(const Tensor& x, const char* name) {
  return {static_cast<char*>(const_cast<void*>(x.const_data_ptr())), 0, x.stride(0),
          type_of(x, name)};
}

// Both must be contiguous.
Lists lists_of(const Tensor& offsets, const Tensor& listed) {
  return {offsets.const_data_ptr<int32_t>(), listed.const_data_ptr<int32_t>(), offsets.numel() - 1,
          listed.numel()};
}

Tensor sum_lists_of(const Tensor& given_x, const Tensor& given_offsets,
                    const Tensor& given_listed) {
  check_sum_lists(given_x, given_offsets, given_listed);
  const OnDevice on_device(given_x);
  const Tensor x = with_whole_rows(given_x);
  const Tensor offsets = without_gaps(given_offsets), listed = without_gaps(given_listed);
  ListSums s = {};
  s.lists = lists_of(offsets, listed);
  s.x = rows_of(x, "x"), s.rows = x.size(0), s.columns = x.size(1);
  const Tensor sums = new_tensor(x, {s.lists.count, s.columns}, x.scalar_type());
  s.sums = rows_of(sums, "sums");
  s.vector = aligned(x) && aligned(sums);
  s.pieces = pieces_of(s.lists);
  const Tensor parts = new_tensor(x, {2 * s.pieces, s.columns}, ScalarType::Float);
  const Tensor begun = new_tensor(x, {s.pieces}, ScalarType::Int);
  s.parts = parts.mutable_data_ptr<float>(), s.begun = begun.mutable_data_ptr<int32_t>();
  if (sums.numel() > 0) sum_lists(on_device.stream(), s);
  return sums;
}

// The distance between a weight's taps, in elements; nullopt if their distances differ.
std::optional<int64_t> step_of_taps(const Tensor& weight) {
  int64_t step = 1, taps = 1;
  for (int64_t dim = weight.dim() - 1; dim >= 2; --dim) {
    if (weight.size(dim) == 1) continue;
    if (taps == 1) step = weight.stride(dim);
    if (weight.stride(dim) != step * taps) return std::nullopt;
    taps *= weight.size(dim);
  }
  return step;
}

// Whether the kernel can read a weight without packing it first.
bool lies_by_taps(const Tensor& weight) {
  const auto step = step_of_taps(weight);
  if (!step || weight.stride(1) != 1 || weight.size(1) % 8 != 0) return false;
  return (reinterpret_cast<uintptr_t>(weight.const_data_ptr()) | *step * 2 | weight.stride(0) * 2) %
             16 ==
         0;
}

// The weights and biases of several convolutions packed into one tensor, in the format that Packing
// describes.
Tensor packed(const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
              const Convolution& shape, Stream stream) {
  Packing p = {};
  p.channels = static_cast<int>(shape.channels), p.taps = static_cast<int>(shape.taps),
  p.width = std::max(8, (p.channels + 7) / 8 * 8);
  const Tensor result =
      new_tensor(weights[0], {shape.outputs, shape.taps + 1, p.width}, weights[0].scalar_type());
  p.packed = static_cast<uint16_t*>(result.mutable_data_ptr());
  std::vector<Tensor> kept;
  int64_t outputs = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight =
        kept.emplace_back(step_of_taps(weights[i]) ? weights[i] : without_gaps(weights[i]));
    p.parts[p.count] = {
        static_cast<const uint16_t*>(weight.const_data_ptr()),
        biases[i] ? static_cast<const uint16_t*>(biases[i]->const_data_ptr()) : nullptr,
        weight.stride(0),
        weight.stride(1),
        *step_of_taps(weight),
        biases[i] ? biases[i]->stride(0) : 0};
    p.ends[p.count++] = outputs += weight.size(0);
    if (p.count < kMostUnpacked && i + 1 < weights.size()) continue;
    pack_convolution(stream, p);
    p.packed += outputs * (shape.taps + 1) * p.width;
    p.count = 0, outputs = 0;
  }
  return result;
}

// Refuses what the kernel cannot take, though those of other devices can.
Convolution check_fits(const Convolution& shape, const Tensor& weight) {
  STD_TORCH_CHECK(shape.taps <= kMostTaps, "spade_fast: weights has shape ", text(weight.sizes()),
                  "; it should be [out, in, *kernel] with 1 to ", kMostTaps, " taps");
  product(weight, "weights",
          {std::max<int64_t>(1, shape.outputs), shape.taps + 1, shape.channels + 8}, INT32_MAX);
  return shape;
}

Tensor convolve_windows_of(const Tensor& given_rows, std::vector<Tensor> weights,
                           std::vector<std::optional<Tensor>> biases, const Tensor& given_offsets,
                           const Tensor& given_listed, bool relu) {
  check_dtype(given_rows, "rows", {ScalarType::BFloat16, ScalarType::Half});
  const Convolution shape = check_fits(
      check_convolve_windows(given_rows, weights, biases, given_offsets, given_listed), weights[0]);
  const OnDevice on_device(given_rows);
  const Tensor rows = with_whole_rows(given_rows);
  const Tensor offsets = without_gaps(given_offsets), listed = without_gaps(given_listed);
  WindowConvolution w = {};
  w.lists = lists_of(offsets, listed);
  const Tensor results = new_tensor(rows, {w.lists.count, shape.outputs}, rows.scalar_type());
  if (results.numel() == 0) return results;
  w.rows = rows_of(rows, "rows"), w.results = rows_of(results, "results");
  w.row_count = rows.size(0);
  w.vector = aligned(rows), w.relu = relu;
  w.outputs = static_cast<int>(shape.outputs), w.channels = static_cast<int>(shape.channels),
  w.taps = static_cast<int>(shape.taps);
  const bool as_it_lies = weights.size() == 1 && lies_by_taps(weights[0]);
  const Tensor weight =
      as_it_lies ? weights[0] : packed(weights, biases, shape, on_device.stream());
  w.weight = static_cast<const char*>(weight.const_data_ptr());
  w.output = weight.stride(0);
  if (as_it_lies) {
    w.tap = *step_of_taps(weight), w.width = w.channels;
    w.bias = biases[0] ? static_cast<const char*>(biases[0]->const_data_ptr()) : nullptr;
    w.bias_step = biases[0] ? biases[0]->stride(0) : 0;
  } else {
    w.tap = weight.stride(1), w.width = static_cast<int>(weight.size(2));
    w.bias = w.weight + 2 * w.taps * w.tap, w.bias_step = w.output;
  }
  convolve_windows(on_device.stream(), w);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SPADE_FAST_NAMESPACE, SPADE_FAST_DISPATCH_KEY, library) {
  library.impl("sum_lists", TORCH_BOX(&sum_lists_of));
  library.impl("convolve_windows", TORCH_BOX(&convolve_windows_of));
}

}  // namespace spade_fast
