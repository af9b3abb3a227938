// Packs a convolution's weight and bias in the order in which convolve_windows reads them: taps
// outside, channels inside. A block packs one output, through shared memory, so that both the loads
// and the stores are coalesced.

#include "kernels.h"
#include "windows.h"

namespace spade_fast {
namespace {

// Elements of a weight in a block's shared memory: some channels with all their taps.
constexpr int64_t kHeld = 8192;

__global__ void __launch_bounds__(kThreads) pack_convolution_kernel(Packing p, int held_channels) {
  uint16_t* held = reinterpret_cast<uint16_t*>(shared_memory());  // [channels, taps]
  int number = 0;
  while (blockIdx.x >= p.ends[number]) ++number;
  const Unpacked part = p.parts[number];
  const int64_t output = blockIdx.x - (number == 0 ? 0 : p.ends[number - 1]);
  const uint16_t* weight = part.weight + output * part.output;
  uint16_t* packed = p.packed + static_cast<int64_t>(blockIdx.x) * (p.taps + 1) * p.width;
  for (int first = 0; first < p.width; first += held_channels) {
    const int channels = p.width - first < held_channels ? p.width - first : held_channels;
    for (int i = threadIdx.x; i < channels * p.taps; i += kThreads) {
      const bool taps_together = part.tap < part.channel;
      const int channel = taps_together ? i / p.taps : i % channels,
                tap = taps_together ? i % p.taps : i / channels;
      const bool exists = first + channel < p.channels;
      held[channel * p.taps + tap] =
          exists ? __ldg(weight + (first + channel) * part.channel + tap * part.tap) : uint16_t{0};
    }
    __syncthreads();
    const int vectors = channels / 8;
    for (int i = threadIdx.x; i < vectors * (p.taps + 1); i += kThreads) {
      const int tap = i / vectors, channel = i % vectors * 8;
      uint32_t words[4] = {};
      if (tap < p.taps) {
#pragma unroll
        for (int k = 0; k < 8; ++k)
          words[k / 2] |= static_cast<uint32_t>(held[(channel + k) * p.taps + tap]) << k % 2 * 16;
      } else if (first + channel == 0 && part.bias != nullptr) {
        words[0] = part.bias[output * part.bias_step];
      }
      *reinterpret_cast<uint4*>(packed + tap * p.width + first + channel) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
    __syncthreads();
  }
}

}  // namespace

void pack_convolution(Stream stream, const Packing& p) {
  const int channels =
      static_cast<int>(std::clamp<int64_t>(kHeld / p.taps / 8 * 8, 8, std::max(p.width, 8)));
  launch(pack_convolution_kernel, p.ends[p.count - 1], dim3(kThreads),
         int64_t{2} * channels * p.taps, stream, p, channels);
}

}  // namespace spade_fast
