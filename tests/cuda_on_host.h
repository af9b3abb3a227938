// CUDA's part of C++ on a host, so that the kernels of csrc/cuda run, and are tested, without a GPU: include it before them.
//
// The threads of a block are fibers of one thread of the host: each runs until it waits for the others of its warp or block. The device's
// limits are environment variables. Shared memory is new for each block, and full of NaNs.
#pragma once
#define SPADE_FAST_ON_HOST

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace host {

struct Group {  // threads that wait for each other
  unsigned size = 0, arrived = 0, round = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  unsigned number;
  bool done;
};

constexpr size_t kStack = 256 << 10;
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers(1024);
inline Fiber* current;
inline std::function<void()> body;
inline Group block, warps[32];
inline uint64_t exchanged[1024];
inline bool progress;
inline dim3 block_index, block_size, grid_size;
inline char* shared;

inline void run() {
  body();
  current->done = progress = true;
}

inline void wait_for(Group& group) {
  const unsigned round = group.round;
  if (++group.arrived == group.size) {
    group.arrived = 0, ++group.round, progress = true;
  } else {
    while (group.round == round) swapcontext(&current->context, &scheduler);
  }
}

template <typename T>
T exchange(T value, unsigned from) {
  Group& warp = warps[current->number / 32];
  std::memcpy(&exchanged[current->number], &value, sizeof(T));
  wait_for(warp);
  std::memcpy(&value, &exchanged[current->number / 32 * 32 + from], sizeof(T));
  wait_for(warp);
  return value;
}

inline void run_block(dim3 threads) {
  const unsigned count = threads.x * threads.y;
  block = {count};
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = kStack, fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, &run, 0);
    fiber.thread = dim3(i % threads.x, i / threads.x), fiber.number = i, fiber.done = false;
    warps[i / 32] = {32};
  }
  for (progress = true; progress;) {
    progress = false;
    for (unsigned i = 0; i < count; ++i) {
      current = &fibers[i];
      if (!current->done) swapcontext(&scheduler, &current->context);
    }
  }
  for (unsigned i = 0; i < count; ++i) {
    if (!fibers[i].done) std::fprintf(stderr, "thread %u of block %u waits for ever\n", i, block_index.x), std::abort();
  }
}

inline int64_t limit(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::atoll(value) : otherwise;
}

}  // namespace host

#define threadIdx (host::current->thread)
#define blockIdx (host::block_index)
#define blockDim (host::block_size)
#define gridDim (host::grid_size)

inline void __syncthreads() { host::wait_for(host::block); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) { return host::exchange(value, (host::current->number % 32) ^ lanes); }
template <typename T>
T __shfl_up_sync(unsigned, T value, int lanes) {
  const int lane = host::current->number % 32;
  return host::exchange(value, lane < lanes ? lane : lane - lanes);
}
inline uint32_t __ballot_sync(unsigned, bool predicate) {
  uint32_t bits = predicate ? 1u << host::current->number % 32 : 0;
  for (int lanes = 1; lanes < 32; lanes *= 2) bits |= __shfl_xor_sync(~0u, bits, lanes);
  return bits;
}
template <typename T>
T __ldg(const T* from) { return *from; }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

namespace spade_fast {

using Stream = int;

struct OnDevice {
  template <typename Tensor>
  explicit OnDevice(const Tensor&) {}
  Stream stream() const { return 0; }
};

constexpr int64_t kSharedMemory = 227 << 10;
inline int64_t most_shared_memory() { return host::limit("SPADE_FAST_HOST_SHARED", kSharedMemory); }  // none: two passes
inline int64_t processors() { return host::limit("SPADE_FAST_HOST_PROCESSORS", 2); }

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, int64_t shared, Stream, Arguments... arguments) {
  if (threads.x * threads.y % 32 != 0 || threads.x * threads.y > 1024) throw std::runtime_error("a block is not of whole warps");
  if (shared > kSharedMemory) throw std::runtime_error("a block has too much shared memory");
  host::body = [=] { kernel(arguments...); };
  host::block_size = threads, host::grid_size = dim3(static_cast<unsigned>(blocks));
  for (int64_t block = 0; block < blocks; ++block) {
    const std::unique_ptr<char[]> memory(new char[shared]);  // of operator new: 16-byte aligned
    std::memset(memory.get(), 0xff, shared);
    host::shared = memory.get();
    host::block_index = dim3(static_cast<unsigned>(block));
    host::run_block(threads);
  }
}

inline char* shared_memory() { return host::shared; }
inline void copy_async(void* shared, const void* global) { std::memcpy(shared, global, 16); }
inline void wait_for_copies() {}
inline float from_half(uint32_t bits) { return c10::Half(static_cast<uint16_t>(bits), c10::Half::from_bits()); }
inline uint32_t to_half(float value) { return c10::Half(value).x; }
inline uint32_t to_bfloat16(float value) { return c10::BFloat16(value).x; }

}  // namespace spade_fast
