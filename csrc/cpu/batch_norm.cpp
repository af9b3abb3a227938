// batch_planes and batch_terms on the CPU: what batch norm does between the kernels that pass over
// x, as arithmetic on the numbers of the planes. Plain PyTorch needs a dozen operators for it.

#include <algorithm>
#include <cmath>

#include "tensors.h"

namespace spade_fast {
namespace {

// A channel's planes are pooled over the batch. Squared deviations combine exactly (Chan et al.,
// 1979): those from the planes' own means, and those of the planes' means from the pool's.
std::tuple<Tensor, Tensor> batch_planes(const Tensor& x, const Tensor& moments,
                                        std::optional<Tensor> weight, std::optional<Tensor> bias,
                                        double eps) {
  const Extent extent = check_batch_planes(x, moments, weight, bias);
  const ScalarType dtype = sum_dtype(x.scalar_type());
  const int64_t images = extent.images, channels = extent.channels, all = images * channels;
  const Tensor planes = new_tensor(x, {3, images, channels}, dtype),
               statistics = new_tensor(x, {3, channels}, dtype);
  dispatch_sum(x.scalar_type(), [&](auto zero) {
    using Sum = decltype(zero);
    const Flat<Sum> found(moments), weights(weight), biases(bias);
    const double pixels = extent.pixels, total = pixels * images;
    Sum* to = planes.mutable_data_ptr<Sum>();
    Sum* pooled = statistics.mutable_data_ptr<Sum>();
    for (int64_t channel = 0; channel < channels; ++channel) {
      double mean = 0, squares = 0;
      for (int64_t plane = channel; plane < all; plane += channels) mean += found[plane];
      mean /= std::max<int64_t>(images, 1);
      for (int64_t plane = channel; plane < all; plane += channels) {
        const double deviation = found[plane] - mean;
        squares += found[all + plane] + pixels * deviation * deviation;
      }
      const double inverse = 1 / std::sqrt(squares / std::max(total, 1.0) + eps);
      pooled[channel] = mean;
      pooled[channels + channel] = inverse;
      pooled[2 * channels + channel] = squares / (total - 1);
      const double scale = weights ? inverse * weights[channel] : inverse,
                   offset = biases ? biases[channel] : 0;
      for (int64_t plane = channel; plane < all; plane += channels)
        to[plane] = mean, to[all + plane] = scale, to[2 * all + plane] = offset;
    }
  });
  return {planes, statistics};
}

// The terms of dx, from the sums that backward_sums found for each plane.
Tensor batch_terms(const Tensor& x, const Tensor& sums, const Tensor& inverse_deviation,
                   std::optional<Tensor> weight) {
  const Extent extent = check_batch_terms(x, sums, inverse_deviation, weight);
  const ScalarType dtype = sum_dtype(x.scalar_type());
  const int64_t images = extent.images, channels = extent.channels, all = images * channels;
  const Tensor terms = new_tensor(x, {2, images, channels}, dtype);
  dispatch_sum(x.scalar_type(), [&](auto zero) {
    using Sum = decltype(zero);
    const Flat<Sum> found(sums), inverses(inverse_deviation), weights(weight);
    const double total = std::max<double>(static_cast<double>(extent.pixels) * images, 1);
    Sum* to = terms.mutable_data_ptr<Sum>();
    for (int64_t channel = 0; channel < channels; ++channel) {
      double q = 0, q_deviation = 0;
      for (int64_t plane = channel; plane < all; plane += channels)
        q += found[plane], q_deviation += found[all + plane];
      const double inverse = inverses[channel],
                   share = (weights ? weights[channel] * inverse : inverse) / -total;
      for (int64_t plane = channel; plane < all; plane += channels) {
        to[plane] = q * share;
        to[all + plane] = q_deviation * share * inverse * inverse;
      }
    }
  });
  return terms;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, library) {
  library.impl("batch_planes", TORCH_BOX(&batch_planes));
  library.impl("batch_terms", TORCH_BOX(&batch_terms));
}

}  // namespace spade_fast
