// The planes of a batch norm in eval mode, from its running statistics and its own parameters:
//
//   shift = mean,  scale = weight / sqrt(variance + eps),  offset = bias
//
// A thread computes the three numbers of one plane (n, c). Plain PyTorch needs six launches.

#include "elements.h"
#include "kernels.h"

namespace spade_fast {
namespace {

__global__ void __launch_bounds__(kThreads) running_planes_kernel(RunningStatistics s) {
  const int64_t all = s.images * s.channels,
                plane = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (plane >= all) return;
  const int64_t channel = plane % s.channels;
  const float scale = 1 / sqrtf(number_at(s.variance, channel) + s.eps);
  s.planes[plane] = number_at(s.mean, channel);
  s.planes[all + plane] = s.weight.data == nullptr ? scale : scale * number_at(s.weight, channel);
  s.planes[2 * all + plane] = s.bias.data == nullptr ? 0 : number_at(s.bias, channel);
}

}  // namespace

void running_planes(Stream stream, const RunningStatistics& s) {
  launch(running_planes_kernel, divide_up(s.images * s.channels, kThreads), dim3(kThreads), 0,
         stream, s);
}

}  // namespace spade_fast
