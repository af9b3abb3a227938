// Prefix sums over a block.
#pragma once

#include "device.h"

namespace spade_fast {

// The inclusive prefix sum of the block's values, and in `all` their total. scratch has one value
// per warp.
template <typename T>
__device__ T scan_block(T value, T* scratch, T* all) {
  const int lane = threadIdx.x % 32, mine = threadIdx.x / 32;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const T before = __shfl_up_sync(~0u, value, lanes);
    if (lane >= lanes) value += before;
  }
  __syncthreads();  // scratch may still be read
  if (lane == 31) scratch[mine] = value;
  __syncthreads();
  *all = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x / 32); ++warp) {
    if (warp == mine) value += *all;
    *all += scratch[warp];
  }
  return value;
}

}  // namespace spade_fast
