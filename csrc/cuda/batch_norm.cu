// What batch norm does between the kernels that pass over x, as arithmetic on the numbers of the
// planes. A thread pools the planes of one channel over the batch. Plain PyTorch needs a dozen
// launches.

#include "elements.h"
#include "kernels.h"

namespace spade_fast {
namespace {

// Squared deviations combine exactly (Chan et al., 1979): those from the planes' own means, and
// those of the planes' means from the pool's.
__global__ void __launch_bounds__(kThreads) batch_planes_kernel(BatchNorm b) {
  const int64_t all = b.images * b.channels,
                channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= b.channels) return;
  float mean = 0, squares = 0;
  for (int64_t plane = channel; plane < all; plane += b.channels) mean += b.found[plane];
  mean /= fmaxf(b.images, 1);
  for (int64_t plane = channel; plane < all; plane += b.channels) {
    const float deviation = b.found[plane] - mean;
    squares += b.found[all + plane] + b.pixels * deviation * deviation;
  }
  const float total = b.pixels * b.images, inverse = 1 / sqrtf(squares / fmaxf(total, 1) + b.eps);
  b.statistics[channel] = mean;
  b.statistics[b.channels + channel] = inverse;
  b.statistics[2 * b.channels + channel] = squares / (total - 1);
  const float scale = b.weight.data == nullptr ? inverse : inverse * number_at(b.weight, channel),
              offset = b.bias.data == nullptr ? 0 : number_at(b.bias, channel);
  for (int64_t plane = channel; plane < all; plane += b.channels) {
    b.results[plane] = mean;
    b.results[all + plane] = scale;
    b.results[2 * all + plane] = offset;
  }
}

__global__ void __launch_bounds__(kThreads) batch_terms_kernel(BatchNorm b) {
  const int64_t all = b.images * b.channels,
                channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= b.channels) return;
  float q = 0, q_deviation = 0;
  for (int64_t plane = channel; plane < all; plane += b.channels) {
    q += b.found[plane];
    q_deviation += b.found[all + plane];
  }
  const float inverse = b.inverse_deviation[channel],
              scale = b.weight.data == nullptr ? inverse : inverse * number_at(b.weight, channel),
              share = scale / -fmaxf(b.pixels * b.images, 1);
  for (int64_t plane = channel; plane < all; plane += b.channels) {
    b.results[plane] = q * share;
    b.results[all + plane] = q_deviation * share * inverse * inverse;
  }
}

void launch_over_channels(void (*kernel)(BatchNorm), Stream stream, const BatchNorm& b) {
  launch(kernel, divide_up(b.channels, kThreads), dim3(kThreads), 0, stream, b);
}

}  // namespace

void batch_planes(Stream stream, const BatchNorm& b) {
  launch_over_channels(batch_planes_kernel, stream, b);
}

void batch_terms(Stream stream, const BatchNorm& b) {
  launch_over_channels(batch_terms_kernel, stream, b);
}

}  // namespace spade_fast
