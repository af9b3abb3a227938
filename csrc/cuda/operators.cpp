// The operators of contract.py for the modulation on CUDA: checks, outputs and workspaces, and the
// kernels' arguments.

#include <tuple>

#include "../common/checks.h"
#include "kernels.h"
#include "on_device.h"

namespace spade_fast {
namespace {

// One call of an operator: its tensors as kernel arguments, and the launch settings that follow
// from them. Keeps copies of tensors alive until the kernels are launched.
class Call {
 public:
  explicit Call(const Tensor& x)
      : on_device_(x), x_(x), layout_(layout_of(x)), last_(layout_ == Layout::channels_last) {
    operands.shape = {x.size(0), x.size(1), 1};
    for (int64_t dim = 2; dim < x.dim(); ++dim) operands.shape.pixels *= x.size(dim);
    STD_TORCH_CHECK(operands.shape.pixels <= INT32_MAX, "spade_fast: x has ", operands.shape.pixels,
                    " pixels; it should have at most ", INT32_MAX);
    operands.vector = !last_ || x.size(1) % 4 == 0;  // numbers per plane are loaded four at a time
    operands.x = read(x, "x");
  }

  void modulate(const Tensor& gamma, const std::optional<Tensor>& beta,
                const std::optional<Tensor>& index, const std::optional<std::string>& activation,
                double negative_slope, bool plus_one) {
    operands.activation = activation_named(activation);
    operands.negative_slope = static_cast<float>(negative_slope);
    operands.addend = plus_one ? 1 : 0;
    if (index) {
      operands.index = kept(without_gaps(*index)).const_data_ptr<int32_t>();
      operands.rows = static_cast<uint32_t>(gamma.size(0));
    }
    const auto read_modulation = [&](const Tensor& rows, const char* name) {
      return index ? read_table(rows, name) : read(rows, name);
    };
    operands.gamma = read_modulation(gamma, "gamma");
    if (beta) operands.beta = read_modulation(*beta, "beta");
  }

  void backward(const Tensor& dy, const Tensor& signs, const Tensor& planes) {
    operands.dy = read(dy, "dy");
    operands.planes = numbers(planes);
    if (signs.numel() > 0)
      operands.signs = const_cast<uint8_t*>(kept(without_gaps(signs)).const_data_ptr<uint8_t>());
  }

  // Numbers per plane [k, N, C].
  const float* numbers(const Tensor& given) {
    const Tensor& numbers = kept(without_gaps(given));
    aligned(numbers.const_data_ptr(), 0);
    return numbers.const_data_ptr<float>();
  }

  Tensor new_signs(bool keep_signs) {
    const auto [images, channels, pixels] = operands.shape;
    if (!keep_signs || !keeps_signs(operands.activation))
      return new_tensor(x_, {0}, ScalarType::Byte);
    const int64_t rows = last_ ? pixels : channels, length = last_ ? channels : pixels;
    const Tensor signs = new_tensor(x_, {images, rows, (length + 7) / 8}, ScalarType::Byte);
    operands.signs = signs.mutable_data_ptr<uint8_t>();
    return signs;
  }

  // A tensor of x's shape for a kernel to write, or one of size 0 that stands for none.
  Tensor output(ScalarType dtype, bool exists = true) {
    return exists ? new_output(x_, layout_, dtype) : new_tensor(x_, {0}, dtype);
  }
  Rows written(const Tensor& y) { return y.dim() == x_.dim() ? read(y, "y") : Rows{}; }
  Tensor finished(const Tensor& y) const { return spade_fast::finished(y, x_, layout_); }

  Tensor workspace(int64_t size, ScalarType dtype = ScalarType::Float) {
    return kept(new_tensor(x_, {size}, dtype));
  }
  Tensor per_plane(int64_t numbers) const {
    return new_tensor(x_, {numbers, operands.shape.images, operands.shape.channels},
                      ScalarType::Float);
  }
  int64_t planes() const { return operands.shape.images * operands.shape.channels; }

  // The launch settings; call it after all tensors are set.
  Settings settings() const {
    const int64_t length = last_ ? operands.shape.channels : operands.shape.pixels;
    const int vector = narrow_ && operands.vector && length % 8 == 0 ? 8 : 4;
    return {on_device_.stream(), vector, last_, operands.vector && length % vector == 0};
  }
  Division sweep() const {
    return spade_fast::sweep(operands.shape, settings().vector, last_, processors());
  }
  Division tiles() const {
    return spade_fast::tiles(operands.shape, settings().vector, last_, operands.index != nullptr,
                             processors());
  }
  std::optional<Division> one_pass(int64_t held) const {
    return spade_fast::one_pass(operands.shape, settings().vector, last_, held,
                                most_shared_memory(), most_blocks(), processors());
  }

  Operands operands = {};

 private:
  Rows read(const Tensor& x, const char* name) {
    const Type type = type_of(x, name);
    const Tensor& rows = kept(with_rows(x, layout_));
    const int64_t distance = *row_distance(rows, layout_);
    if (last_) check_distance(distance, name);
    return noted({static_cast<char*>(const_cast<void*>(rows.const_data_ptr())), rows.stride(0),
                  distance, type});
  }

  Rows read_table(const Tensor& table, const char* name) {
    const Type type = type_of(table, name);
    const Tensor& rows = kept(table.stride(1) == 1 ? table : without_gaps(table));
    check_distance(rows.stride(0), name);
    return noted(
        {static_cast<char*>(const_cast<void*>(rows.const_data_ptr())), 0, rows.stride(0), type});
  }

  // Cursors hold the distance between rows, in bytes, in 32 bits.
  static void check_distance(int64_t elements, const char* name) {
    STD_TORCH_CHECK(elements <= UINT32_MAX / 4, "spade_fast: ", name, " has rows ", elements,
                    " elements apart; they should be at most ", UINT32_MAX / 4, " apart");
  }

  Rows noted(const Rows& rows) {
    const int64_t size = rows.type == Type::float32 ? 4 : 2;
    narrow_ = narrow_ && size == 2;
    aligned(rows.data, (rows.image | rows.row) * size);
    return rows;
  }

  void aligned(const void* data, int64_t distances) {
    operands.vector = operands.vector && (reinterpret_cast<uintptr_t>(data) | distances) % 16 == 0;
  }

  const Tensor& kept(Tensor x) { return *kept_.insert(kept_.end(), std::move(x)); }

  OnDevice on_device_;
  Tensor x_;
  Layout layout_;
  bool last_, narrow_ = true;
  std::vector<Tensor> kept_;
};

// Computes the planes [3, N, C] of instance norm if `planes` is given, else moments [2, N, C].
void measure(Call& call, double eps, float* moments, float* planes) {
  const Division d = call.sweep();
  float* parts = call.workspace(kMomentParts * d.splits * call.planes()).mutable_data_ptr<float>();
  plane_moments(call.settings(), call.operands, d, parts);
  combine_moments(call.settings(), call.operands, d, parts, static_cast<float>(eps), moments,
                  planes);
}

Tensor plane_moments_of(const Tensor& x) {
  check_features(x);
  Call call(x);
  const Tensor moments = call.per_plane(2);
  measure(call, 0, moments.mutable_data_ptr<float>(), nullptr);
  return moments;
}

// Numbers as kernels read them, and the tensors that hold them until the kernels are launched.
class Numbers {
 public:
  // A number for each channel, in any dtype but float64; null if there is no tensor.
  Rows of_channels(const std::optional<Tensor>& given, const char* name) {
    if (!given) return {};
    const bool is_wide = given->scalar_type() == ScalarType::Double;
    const Tensor& held = hold(is_wide ? in_dtype(*given, ScalarType::Float) : *given);
    return {static_cast<char*>(const_cast<void*>(held.const_data_ptr())), 0, 0,
            type_of(held, name)};
  }

  const float* of(const Tensor& given) { return hold(given).const_data_ptr<float>(); }

 private:
  const Tensor& hold(const Tensor& given) {
    kept_.push_back(without_gaps(given));
    return kept_.back();
  }

  std::vector<Tensor> kept_;
};

Tensor running_planes_of(const Tensor& x, const Tensor& mean, const Tensor& variance,
                         std::optional<Tensor> weight, std::optional<Tensor> bias, double eps) {
  const Extent extent = check_running_planes(x, mean, variance, weight, bias);
  const OnDevice on_device(x);
  Numbers numbers;
  const Tensor planes = new_tensor(x, {3, extent.images, extent.channels}, ScalarType::Float);
  RunningStatistics s = {};
  s.images = extent.images, s.channels = extent.channels, s.eps = static_cast<float>(eps);
  s.mean = numbers.of_channels(mean, "mean");
  s.variance = numbers.of_channels(variance, "variance");
  s.weight = numbers.of_channels(weight, "weight"), s.bias = numbers.of_channels(bias, "bias");
  s.planes = planes.mutable_data_ptr<float>();
  running_planes(on_device.stream(), s);
  return planes;
}

std::tuple<Tensor, Tensor> batch_planes_of(const Tensor& x, const Tensor& moments,
                                           std::optional<Tensor> weight, std::optional<Tensor> bias,
                                           double eps) {
  const Extent extent = check_batch_planes(x, moments, weight, bias);
  const OnDevice on_device(x);
  Numbers numbers;
  const Tensor planes = new_tensor(x, {3, extent.images, extent.channels}, ScalarType::Float),
               statistics = new_tensor(x, {3, extent.channels}, ScalarType::Float);
  BatchNorm b = {};
  b.found = numbers.of(moments), b.eps = static_cast<float>(eps);
  b.weight = numbers.of_channels(weight, "weight"), b.bias = numbers.of_channels(bias, "bias");
  b.pixels = extent.pixels, b.images = extent.images, b.channels = extent.channels;
  b.results = planes.mutable_data_ptr<float>();
  b.statistics = statistics.mutable_data_ptr<float>();
  batch_planes(on_device.stream(), b);
  return {planes, statistics};
}

Tensor batch_terms_of(const Tensor& x, const Tensor& sums, const Tensor& inverse_deviation,
                      std::optional<Tensor> weight) {
  const Extent extent = check_batch_terms(x, sums, inverse_deviation, weight);
  const OnDevice on_device(x);
  Numbers numbers;
  const Tensor terms = new_tensor(x, {2, extent.images, extent.channels}, ScalarType::Float);
  BatchNorm b = {};
  b.found = numbers.of(sums), b.inverse_deviation = numbers.of(inverse_deviation);
  b.weight = numbers.of_channels(weight, "weight");
  b.pixels = extent.pixels, b.images = extent.images, b.channels = extent.channels;
  b.results = terms.mutable_data_ptr<float>();
  batch_terms(on_device.stream(), b);
  return terms;
}

// Computes y, into a new tensor or `out`, and its signs. out may be x or γ: only the thread that
// writes an element reads it, and it does so before.
std::tuple<Tensor, Tensor> modulated(const Tensor& x, const Tensor& planes, const Tensor& gamma,
                                     const Tensor& beta, const std::optional<Tensor>& index,
                                     const std::optional<std::string>& activation,
                                     double negative_slope, bool keep_signs, bool plus_one,
                                     const std::optional<Tensor>& out) {
  check_apply(x, planes, gamma, beta, index);
  if (out) check_out(*out, x, gamma);
  Call call(x);
  call.modulate(gamma, beta, index, activation, negative_slope, plus_one);
  call.operands.planes = call.numbers(planes);
  const Tensor y = out ? *out : call.output(promoted(x.scalar_type(), gamma.scalar_type())),
               signs = call.new_signs(keep_signs);
  const Rows rows = call.written(y);
  apply(call.settings(), call.operands, call.tiles(), rows);
  return {out ? y : call.finished(y), signs};
}

std::tuple<Tensor, Tensor> apply_to(const Tensor& x, const Tensor& planes, const Tensor& gamma,
                                    const Tensor& beta, std::optional<Tensor> index,
                                    std::optional<std::string> activation, double negative_slope,
                                    bool keep_signs, bool plus_one) {
  return modulated(x, planes, gamma, beta, index, activation, negative_slope, keep_signs, plus_one,
                   std::nullopt);
}

void apply_out_to(const Tensor& x, const Tensor& planes, const Tensor& gamma, const Tensor& beta,
                  std::optional<Tensor> index, std::optional<std::string> activation,
                  double negative_slope, Tensor out, bool plus_one) {
  modulated(x, planes, gamma, beta, index, activation, negative_slope, false, plus_one, out);
}

std::tuple<Tensor, Tensor> sum_dense(Call& call, ScalarType dtype, float* sums, float* terms) {
  const Tensor dgamma = call.output(dtype),
               dbeta = call.output(dtype, call.operands.activation != Activation::none);
  const Rows dgamma_rows = call.written(dgamma), dbeta_rows = call.written(dbeta);
  const Division d = call.sweep();
  float* parts = call.workspace(kSumParts * d.splits * call.planes()).mutable_data_ptr<float>();
  backward_sums(call.settings(), call.operands, d, dgamma_rows, dbeta_rows, parts);
  combine_sums(call.settings(), call.operands, d.splits, parts, sums, terms);
  return {call.finished(dgamma), call.finished(dbeta)};
}

std::tuple<Tensor, Tensor> sum_table(Call& call, const Tensor& gamma, const Tensor& index,
                                     const Tensor& order, float* sums, float* terms) {
  const auto [images, channels, pixels] = call.operands.shape;
  const int64_t places = product(index, "index", {images, pixels}, INT32_MAX), rows = gamma.size(0);
  const Type type = type_of(gamma, "gamma");
  const Tensor dgamma = new_tensor(gamma, {rows, channels}, gamma.scalar_type()),
               dbeta = new_tensor(gamma, {rows, channels}, gamma.scalar_type());
  const Rows dgamma_rows = {static_cast<char*>(dgamma.data_ptr()), 0, channels, type};
  const Rows dbeta_rows = {static_cast<char*>(dbeta.data_ptr()), 0, channels, type};
  Pieces pieces = {};
  const Tensor order_of_all = without_gaps(order);
  pieces.order = order_of_all.const_data_ptr<int32_t>();
  pieces.rows = rows;
  pieces.most = std::min(places, images * rows + divide_up(pixels, kPiece) * images);
  // Half the memory of x in 16 bits, or kAlwaysKept, suffices for the layouts of real scenes.
  // Pieces that do not fit are summed twice.
  pieces.kept = std::min(pieces.most, std::max(divide_up(places, 8),
                                               kAlwaysKept / (8 * std::max<int64_t>(1, channels))));
  const auto whole_numbers = [&](int64_t size) {
    return call.workspace(size, ScalarType::Int).mutable_data_ptr<int32_t>();
  };
  pieces.counts = whole_numbers(divide_up(places, kPlaces));
  pieces.firsts = whole_numbers(pieces.most + 1);
  pieces.piece_rows = whole_numbers(pieces.most);
  pieces.places = whole_numbers(pieces.most);
  const Tensor zeros =
      torch::stable::new_zeros(gamma, {images + 1 + 1 + rows + 2 * rows * images}, ScalarType::Int);
  pieces.image_firsts = zeros.mutable_data_ptr<int32_t>();
  pieces.taken = pieces.image_firsts + images + 1;
  pieces.row_pieces = pieces.taken + 1;
  pieces.ranges = pieces.row_pieces + rows;
  pieces.found = call.workspace(2 * pieces.kept * channels).mutable_data_ptr<float>();
  const Settings settings = over_channels(call.settings(), channels);
  // A block sums `lanes` pieces of an image at a time.
  const int64_t columns = columns_of(divide_up(channels, settings.vector)),
                lanes = kThreads / columns,
                channel_blocks = divide_up(channels, columns * settings.vector);
  const int64_t wanted =
      divide_up(kBlocks * processors(), std::max<int64_t>(1, images * channel_blocks));
  const int64_t splits = std::clamp<int64_t>(
      wanted, 1, std::max<int64_t>(1, pieces.most / std::max<int64_t>(1, images) / lanes));
  float* parts = call.workspace(kSumParts * splits * call.planes()).mutable_data_ptr<float>();
  table_sums(settings, call.operands, pieces, splits, dgamma_rows, dbeta_rows, parts);
  combine_sums(call.settings(), call.operands, splits, parts, sums, terms);
  return {dgamma, dbeta};
}

// Computes dγ and dβ, and the sums [2, N, C] or, if `sums` is null, the terms of instance norm.
std::tuple<Tensor, Tensor> sum_gradients(Call& call, const Tensor& gamma,
                                         const std::optional<Tensor>& index,
                                         const std::optional<Tensor>& order, float* sums,
                                         float* terms) {
  if (!index) return sum_dense(call, gamma.scalar_type(), sums, terms);
  return sum_table(call, gamma, *index, *order, sums, terms);
}

std::tuple<Tensor, Tensor, Tensor> backward_sums_of(
    const Tensor& dy, const Tensor& x, const Tensor& planes, const Tensor& gamma,
    std::optional<Tensor> beta, std::optional<Tensor> index, std::optional<Tensor> order,
    const Tensor& signs, std::optional<std::string> activation, double negative_slope,
    bool plus_one) {
  check_backward_sums(dy, x, planes, gamma, beta, index, order, signs,
                      activation_named(activation));
  Call call(x);
  call.modulate(gamma, beta, index, activation, negative_slope, plus_one);
  call.backward(dy, signs, planes);
  const Tensor sums = call.per_plane(2);
  float* data = sums.mutable_data_ptr<float>();
  const auto [dgamma, dbeta] = sum_gradients(call, gamma, index, order, data, nullptr);
  return {dgamma, dbeta, sums};
}

Tensor backward_input_of(const Tensor& dy, const Tensor& x, const Tensor& planes,
                         const Tensor& gamma, std::optional<Tensor> beta,
                         std::optional<Tensor> index, const Tensor& signs,
                         std::optional<Tensor> terms, std::optional<std::string> activation,
                         double negative_slope, bool plus_one) {
  check_backward_input(dy, x, planes, gamma, beta, index, signs, terms,
                       activation_named(activation));
  Call call(x);
  call.modulate(gamma, beta, index, activation, negative_slope, plus_one);
  call.backward(dy, signs, planes);
  const float* term_data = terms ? call.numbers(*terms) : nullptr;
  const Tensor dx = call.output(x.scalar_type());
  const Rows rows = call.written(dx);
  backward_input(call.settings(), call.operands, call.tiles(), term_data, rows);
  return call.finished(dx);
}

std::tuple<Tensor, Tensor, Tensor> instance_forward_of(const Tensor& x, const Tensor& gamma,
                                                       const Tensor& beta,
                                                       std::optional<Tensor> index, double eps,
                                                       std::optional<std::string> activation,
                                                       double negative_slope, bool keep_signs,
                                                       bool plus_one) {
  check_modulation(x, gamma, beta, index, true);
  Call call(x);
  call.modulate(gamma, beta, index, activation, negative_slope, plus_one);
  const Tensor y = call.output(promoted(x.scalar_type(), gamma.scalar_type())),
               signs = call.new_signs(keep_signs);
  const Tensor planes = call.per_plane(3);
  float* data = planes.mutable_data_ptr<float>();
  call.operands.planes = call.numbers(planes);
  const Rows rows = call.written(y);
  if (const auto d = call.one_pass(1)) {
    instance_forward(call.settings(), call.operands, *d, static_cast<float>(eps), rows, data);
  } else {
    measure(call, eps, nullptr, data);
    apply(call.settings(), call.operands, call.tiles(), rows);
  }
  return {call.finished(y), signs, planes};
}

std::tuple<Tensor, Tensor, Tensor> instance_backward_of(
    const Tensor& dy, const Tensor& x, const Tensor& planes, const Tensor& gamma,
    std::optional<Tensor> beta, std::optional<Tensor> index, std::optional<Tensor> order,
    const Tensor& signs, std::optional<std::string> activation, double negative_slope,
    bool plus_one) {
  check_backward_sums(dy, x, planes, gamma, beta, index, order, signs,
                      activation_named(activation));
  Call call(x);
  call.modulate(gamma, beta, index, activation, negative_slope, plus_one);
  call.backward(dy, signs, planes);
  const Tensor dx = call.output(x.scalar_type());
  const Rows rows = call.written(dx);
  const std::optional<Division> d = index ? std::nullopt : call.one_pass(2);
  if (d) {
    const Tensor dgamma = call.output(gamma.scalar_type());
    const Tensor dbeta =
        call.output(gamma.scalar_type(), call.operands.activation != Activation::none);
    const Rows dgamma_rows = call.written(dgamma), dbeta_rows = call.written(dbeta);
    instance_backward(call.settings(), call.operands, *d, dgamma_rows, dbeta_rows, rows);
    return {call.finished(dgamma), call.finished(dbeta), call.finished(dx)};
  }
  const Tensor terms = call.per_plane(2);
  float* data = terms.mutable_data_ptr<float>();
  const auto [dgamma, dbeta] = sum_gradients(call, gamma, index, order, nullptr, data);
  backward_input(call.settings(), call.operands, call.tiles(), data, rows);
  return {dgamma, dbeta, call.finished(dx)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SPADE_FAST_NAMESPACE, SPADE_FAST_DISPATCH_KEY, library) {
  library.impl("plane_moments", TORCH_BOX(&plane_moments_of));
  library.impl("apply", TORCH_BOX(&apply_to));
  library.impl("apply_out", TORCH_BOX(&apply_out_to));
  library.impl("backward_sums", TORCH_BOX(&backward_sums_of));
  library.impl("backward_input", TORCH_BOX(&backward_input_of));
  library.impl("running_planes", TORCH_BOX(&running_planes_of));
  library.impl("batch_planes", TORCH_BOX(&batch_planes_of));
  library.impl("batch_terms", TORCH_BOX(&batch_terms_of));
  library.impl("instance_forward", TORCH_BOX(&instance_forward_of));
  library.impl("instance_backward", TORCH_BOX(&instance_backward_of));
}

}  // namespace spade_fast
