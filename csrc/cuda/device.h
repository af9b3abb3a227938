// Everything that the kernels need of CUDA beyond the language: launches, shared memory,
// asynchronous copies, conversions. For tests tests/cuda_on_host.h takes its place.
#pragma once

#include <cstdint>

#ifndef SPADE_FAST_ON_HOST
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace spade_fast {

using Stream = cudaStream_t;

inline void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("spade_fast: CUDA error: ") + cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device, value;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

inline int64_t most_shared_memory() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}
inline int64_t processors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
constexpr int64_t kAlwaysKept = 64 << 20;  // bytes that a workspace may have even if x is small

// Copies from the device, after waiting for the stream.
inline void download(void* to, const void* from, int64_t bytes, Stream stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));
}
inline void set_bytes(void* to, int value, int64_t bytes, Stream stream) {
  check(cudaMemsetAsync(to, value, bytes, stream));
}

#ifdef __CUDACC__
// Launches a one-dimensional grid in clusters of `cluster` consecutive blocks; does nothing for no
// blocks.
template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int64_t blocks, int64_t cluster, dim3 threads,
                     int64_t shared, Stream stream, Arguments... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "CUDA's limit before version 12.1");
  if (blocks == 0) return;
  if (blocks > INT32_MAX)
    throw std::runtime_error("spade_fast: the operands are too large for the blocks of one grid");
  if (shared > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared)));
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeClusterDimension;
  together.val.clusterDim.x = static_cast<unsigned>(cluster),
  together.val.clusterDim.y = together.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = threads;
  config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = &together, config.numAttrs = cluster > 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Whether the loaded code of a kernel was compiled for clusters. Code for an older architecture,
// which newer GPUs run too, was not.
template <typename Kernel>
bool knows_clusters(Kernel* kernel) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion >= 90 && device_attribute(cudaDevAttrClusterLaunch) != 0;
}

// A barrier for all threads of the cluster, which also orders their accesses to shared memory.
__device__ inline void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// The value at this address in another block's shared memory (distributed shared memory).
__device__ inline float in_block(uint32_t block, const float* shared) {
  float value = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, "
      "[there];\n}"
      : "=f"(value)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "r"(block)
      : "memory");
#endif
  return value;
}

__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// Copies 16 bytes asynchronously; both addresses must be multiples of 16.
__device__ inline void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
// The same, or stores zeros if there is nothing to copy.
__device__ inline void copy_async_or_zeros(void* shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(exists ? 16 : 0)
               : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Ends a group of this thread's copies: all those since the last call. wait_for_copies_but waits
// for all groups except the last kGroups.
__device__ inline void end_group_of_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kGroups>
__device__ void wait_for_copies_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// For integers only, whose sum does not depend on the order. Returns the previous value.
__device__ inline int32_t add_atomically(int32_t* to, int32_t number) {
  return atomicAdd(to, number);
}

__device__ inline float from_half(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
}
__device__ inline uint32_t to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }
__device__ inline uint32_t to_bfloat16(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
// Converts two values at once, the first to the low bits.
__device__ inline uint32_t to_halves(float first, float second) {
  const __half2 both = __floats2half2_rn(first, second);
  return __half_as_ushort(__low2half(both)) |
         static_cast<uint32_t>(__half_as_ushort(__high2half(both))) << 16;
}
__device__ inline uint32_t to_bfloat16s(float first, float second) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return __bfloat16_as_ushort(__low2bfloat16(both)) |
         static_cast<uint32_t>(__bfloat16_as_ushort(__high2bfloat16(both))) << 16;
}
#endif

}  // namespace spade_fast
#endif
