// running_planes on the CPU: the planes of a batch norm in eval mode, from its running statistics
// and its own parameters: shift = mean, scale = weight / sqrt(variance + eps), offset = bias.

#include <cmath>

#include "tensors.h"

namespace spade_fast {
namespace {

Tensor running_planes(const Tensor& x, const Tensor& mean, const Tensor& variance,
                      std::optional<Tensor> weight, std::optional<Tensor> bias, double eps) {
  const Extent extent = check_running_planes(x, mean, variance, weight, bias);
  const ScalarType dtype = sum_dtype(x.scalar_type());
  const Tensor planes = new_tensor(x, {3, extent.images, extent.channels}, dtype);
  dispatch_sum(x.scalar_type(), [&](auto zero) {
    using Sum = decltype(zero);
    const Flat<Sum> means(mean), variances(variance), weights(weight), biases(bias);
    Sum* to = planes.mutable_data_ptr<Sum>();
    const int64_t all = extent.images * extent.channels;
    for (int64_t plane = 0; plane < all; ++plane) {
      const int64_t channel = plane % extent.channels;
      const Sum scale = 1 / std::sqrt(variances[channel] + static_cast<Sum>(eps));
      to[plane] = means[channel];
      to[all + plane] = weights ? scale * weights[channel] : scale;
      to[2 * all + plane] = biases ? biases[channel] : 0;
    }
  });
  return planes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, library) {
  library.impl("running_planes", TORCH_BOX(&running_planes));
}

}  // namespace spade_fast
