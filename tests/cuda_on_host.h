// CUDA's part of C++ on a host, so that the kernels of csrc/cuda run, and are tested, without a GPU: include it before them.
//
// The threads of a cluster, most often one block, are fibers of one thread of the host: each runs until it waits for the others of its
// warp, block or cluster. The device's limits are environment variables. Shared memory is new for each block, and full of NaNs.
#pragma once
#define SPADE_FAST_ON_HOST

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
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

struct Block {
  dim3 index;
  Group threads, warps[32];
  uint64_t exchanged[1024];
  std::unique_ptr<char[]> shared;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block;
  dim3 thread;
  unsigned number;
  bool done;
};

constexpr size_t kStack = 256 << 10;
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Block> blocks;
inline Fiber* current;
inline std::function<void()> body;
inline Group cluster;
inline bool progress;
inline dim3 block_size, grid_size;
inline int64_t largest_cluster = 0;  // that was launched, since it was asked for

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

// What f makes of the values that the warp's threads give, by lane.
template <typename T, typename F>
auto with_warp(T value, F&& f) {  // what they point to stays until all are done
  Block& block = *current->block;
  const unsigned warp = current->number / 32;
  std::memcpy(&block.exchanged[current->number], &value, sizeof(T));
  wait_for(block.warps[warp]);
  struct AtEnd {
    Group& group;
    ~AtEnd() { wait_for(group); }
  } at_end = {block.warps[warp]};
  return f([&](unsigned lane) {
    T other;
    std::memcpy(&other, &block.exchanged[warp * 32 + lane], sizeof(T));
    return other;
  });
}

template <typename T>
T exchange(T value, unsigned from) {
  return with_warp(value, [&](auto&& of_lane) { return of_lane(from); });
}

// A bit for each lane of the warp whose value is this one.
template <typename T>
uint32_t lanes_with(T value, T own) {
  return with_warp(own, [&](auto&& of_lane) {
    uint32_t bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane) bits |= (of_lane(lane) == value ? 1u : 0u) << lane;
    return bits;
  });
}

inline unsigned lane() { return current->number % 32; }

// What each thread of the warp gives.
inline void gather(uint64_t value, uint64_t (&of_lanes)[32]) {
  Block& block = *current->block;
  const unsigned warp = current->number / 32;
  block.exchanged[current->number] = value;
  wait_for(block.warps[warp]);
  std::copy_n(&block.exchanged[warp * 32], 32, of_lanes);
  wait_for(block.warps[warp]);
}

// The blocks from `first` on, so many together.
inline void run_cluster(int64_t first, unsigned together, dim3 threads, int64_t shared) {
  const unsigned count = threads.x * threads.y;
  if (blocks.size() < together) blocks = std::vector<Block>(together);
  if (fibers.size() < together * count) fibers.resize(together * count);
  cluster = {together * count};
  for (unsigned i = 0; i < together * count; ++i) {
    Block& block = blocks[i / count];
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = kStack, fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, &run, 0);
    fiber.block = &block, fiber.number = i % count, fiber.done = false;
    fiber.thread = dim3(fiber.number % threads.x, fiber.number / threads.x);
    if (fiber.number % 32 == 0) block.warps[fiber.number / 32] = {32};
    if (fiber.number != 0) continue;
    block.index = dim3(static_cast<unsigned>(first + i / count)), block.threads = {count};
    block.shared.reset(new char[shared]);  // of operator new: 16-byte aligned
    std::memset(block.shared.get(), 0xff, shared);
  }
  for (progress = true; progress;) {
    progress = false;
    for (unsigned i = 0; i < together * count; ++i) {
      current = &fibers[i];
      if (!current->done) swapcontext(&scheduler, &current->context);
    }
  }
  for (unsigned i = 0; i < together * count; ++i) {
    const Fiber& fiber = fibers[i];
    if (!fiber.done) std::fprintf(stderr, "thread %u of block %u waits for ever\n", fiber.number, fiber.block->index.x), std::abort();
  }
}

inline int64_t limit(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::atoll(value) : otherwise;
}

}  // namespace host

extern "C" __attribute__((used)) inline int64_t host_largest_cluster() { return std::exchange(host::largest_cluster, 0); }

#define threadIdx (host::current->thread)
#define blockIdx (host::current->block->index)
#define blockDim (host::block_size)
#define gridDim (host::grid_size)

inline void __syncthreads() { host::wait_for(host::current->block->threads); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) { return host::exchange(value, (host::current->number % 32) ^ lanes); }
template <typename T>
T __shfl_up_sync(unsigned, T value, int lanes) {
  const int lane = host::current->number % 32;
  return host::exchange(value, lane < lanes ? lane : lane - lanes);
}
inline uint32_t __ballot_sync(unsigned, bool predicate) { return host::lanes_with(true, predicate); }
template <typename T>
uint32_t __match_any_sync(unsigned, T value) { return host::lanes_with(value, value); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline void __syncwarp() { host::wait_for(host::current->block->warps[host::current->number / 32]); }
template <typename T>
T __ldg(const T* from) {
  const bool aligned = reinterpret_cast<uintptr_t>(from) % sizeof(T) == 0;
  if (!aligned) std::fprintf(stderr, "%zu bytes are read at an address that they do not divide\n", sizeof(T)), std::abort();
  return *from;
}
// No thread is interrupted by another.
template <typename T>
T atomicCAS(T* at, T expected, T value) { return *at == expected ? std::exchange(*at, value) : *at; }
template <typename T>
T atomicMin(T* at, T value) { return std::exchange(*at, std::min(*at, value)); }
template <typename T>
T atomicAdd(T* at, T value) { return std::exchange(*at, *at + value); }
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

template <typename Kernel>
bool knows_clusters(Kernel*) { return host::limit("SPADE_FAST_HOST_CLUSTERS", 1) != 0; }

template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int64_t blocks, int64_t cluster, dim3 threads, int64_t shared, Stream,
                     Arguments... arguments) {
  if (threads.x * threads.y % 32 != 0 || threads.x * threads.y > 1024) throw std::runtime_error("a block is not of whole warps");
  if (shared > kSharedMemory) throw std::runtime_error("a block has too much shared memory");
  if (blocks % cluster != 0) throw std::runtime_error("the blocks are not whole clusters");
  host::largest_cluster = std::max(host::largest_cluster, cluster);
  host::body = [=] { kernel(arguments...); };
  host::block_size = threads, host::grid_size = dim3(static_cast<unsigned>(blocks));
  for (int64_t block = 0; block < blocks; block += cluster) host::run_cluster(block, static_cast<unsigned>(cluster), threads, shared);
}

inline void upload(void* to, const void* from, int64_t bytes, Stream) { std::memcpy(to, from, bytes); }
inline void download(void* to, const void* from, int64_t bytes, Stream) { std::memcpy(to, from, bytes); }
inline void set_bytes(void* to, int value, int64_t bytes, Stream) { std::memset(to, value, bytes); }

inline char* shared_memory() { return host::current->block->shared.get(); }
inline void wait_for_cluster() { host::wait_for(host::cluster); }
inline float in_block(uint32_t block, const float* shared) {
  const int64_t place = reinterpret_cast<const char*>(shared) - shared_memory();
  return *reinterpret_cast<const float*>(host::blocks[block].shared.get() + place);
}
inline void copy_async(void* shared, const void* global) { std::memcpy(shared, global, 16); }
inline void wait_for_copies() {}
inline void add_atomically(int32_t* to, int32_t number) { *to += number; }
inline float from_half(uint32_t bits) { return c10::Half(static_cast<uint16_t>(bits), c10::Half::from_bits()); }
inline uint32_t to_half(float value) { return c10::Half(value).x; }
inline uint32_t to_bfloat16(float value) { return c10::BFloat16(value).x; }
inline uint32_t to_halves(float first, float second) { return to_half(first) | to_half(second) << 16; }
inline uint32_t to_bfloat16s(float first, float second) { return to_bfloat16(first) | to_bfloat16(second) << 16; }

}  // namespace spade_fast
