// CUDA's language extensions for a host compiler, so that the kernels of csrc/cuda run, and are
// tested, without a GPU. Include it before them.
//
// The threads of a cluster, usually a single block, are fibers of one host thread
// (cuda_on_host.cpp). Each runs until it waits for the others of its warp, block or cluster. Every
// block's shared memory starts as NaNs, and so does the target of an asynchronous copy until the
// copy is waited for. These environment variables are read at every launch:
//
//     SPADE_FAST_HOST_SHARED, _PROCESSORS, _CLUSTERS   limits of the device
//     SPADE_FAST_HOST_ORDER     the order in which threads and blocks run: forward, reverse, or the
//                               seed of a random order
//     SPADE_FAST_HOST_WITHOUT   "walk.h:12" leaves out the wait (the barrier) on that line
//
// A file that is compiled with -fsanitize=thread is watched. It is an error if two threads access
// the same bytes, at least one of them writes, and no barrier orders the two accesses. So is an
// access beyond the block's shared memory, a read of shared memory that nothing has written, and an
// access whose address is not a multiple of its width. The launch then ends. Barriers of the warp,
// the block and the cluster order memory; shuffles and atomics do not. Atomics, and volatile
// accesses, do not conflict with each other.
#pragma once
#define SPADE_FAST_ON_HOST

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

#define HOST_UNWATCHED __attribute__((no_sanitize("thread")))

// Hidden, so that each library has these variables for itself: the loader makes the inline
// variables of all libraries of a process one, and a watched library and another would then share
// whether they are watched.
namespace [[gnu::visibility("hidden")]] host {

struct Thread {  // what a thread knows of itself
  dim3 index, block;
  unsigned number;  // within its block
  char* shared;     // its block's shared memory
};
inline Thread* current = nullptr;
inline dim3 threads_of_block, blocks_of_grid;
HOST_UNWATCHED inline dim3 thread_index() { return current->index; }
HOST_UNWATCHED inline dim3 block_index() { return current->block; }
HOST_UNWATCHED inline dim3 block_size() { return threads_of_block; }
HOST_UNWATCHED inline dim3 grid_size() { return blocks_of_grid; }
HOST_UNWATCHED inline unsigned lane() { return current->number % 32; }
HOST_UNWATCHED inline char* shared_memory() { return current->shared; }

void gather(uint64_t value, uint64_t (&of_lanes)[32]);  // the values of all lanes of the warp
void wait_for_warp(const char* file, int line);
void wait_for_block(const char* file, int line);
void wait_for_cluster(const char* file, int line);
void wait_for_copies_but(size_t groups, const char* file, int line);
void copy_async(void* shared, const void* global);  // zeros if global is null
void end_group_of_copies();
float in_block(uint32_t block, const float* shared);
enum Kind : uint8_t { kRead = 0, kWrite = 1, kAtomic = 2 };  // an atomic write is both
inline bool watching = false;
void watch(const void* address, size_t bytes, int kind, size_t divisor);  // the alignment
// Reports an access that the instrumentation does not see, because the caller is HOST_UNWATCHED, or
// sees only in pieces.
HOST_UNWATCHED inline void note(const void* address, size_t bytes, int kind) {
  if (watching) watch(address, bytes, kind, bytes);
}
void launch(int64_t blocks, int64_t cluster, dim3 threads, int64_t shared,
            const std::function<void()>& body);
int64_t limit(const char* name, int64_t otherwise);
// Since the last query: launches of kernels, copies and fills; and how often the host waited.
inline int64_t launches = 0, waits = 0;

template <typename T>
HOST_UNWATCHED T exchange(T value, unsigned from) {
  uint64_t bits = 0, of_lanes[32];
  std::memcpy(&bits, &value, sizeof(T));
  gather(bits, of_lanes);
  std::memcpy(&value, &of_lanes[from], sizeof(T));
  return value;
}

// A bit for each lane of the warp, set if its value equals `value`.
HOST_UNWATCHED inline uint32_t lanes_with(uint64_t value, uint64_t own) {
  uint64_t of_lanes[32];
  gather(own, of_lanes);
  uint32_t bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= (of_lanes[lane] == value ? 1u : 0u) << lane;
  return bits;
}

// Replaces the value at an address by f(value), and returns the old one. Fibers are not preemptive,
// so this is atomic.
template <typename T, typename F>
HOST_UNWATCHED T atomically(T* at, F&& f) {
  note(at, sizeof(T), kWrite | kAtomic);
  const T before = *at;
  *at = f(before);
  return before;
}

}  // namespace host

#define threadIdx (host::thread_index())
#define blockIdx (host::block_index())
#define blockDim (host::block_size())
#define gridDim (host::grid_size())

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::wait_for_block(file, line);
}
inline void __syncwarp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::wait_for_warp(file, line);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return host::exchange(value, host::lane() ^ lanes);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int lanes) {
  const int lane = host::lane();
  return host::exchange(value, lane < lanes ? lane : lane - lanes);
}
inline uint32_t __ballot_sync(unsigned, bool predicate) {
  return host::lanes_with(true, predicate);
}
template <typename T>
uint32_t __match_any_sync(unsigned, T value) {
  return host::lanes_with(value, value);
}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
template <typename T>
T atomicAdd(T* at, T value) {
  return host::atomically(at, [=](T before) { return before + value; });
}
template <typename T>
T atomicMax(T* at, T value) {
  return host::atomically(at, [=](T before) { return value > before ? value : before; });
}
template <typename T>
T atomicCAS(T* at, T expected, T value) {
  return host::atomically(at, [=](T before) { return before == expected ? value : before; });
}
template <typename T>
HOST_UNWATCHED T __ldg(const T* from) {
  host::note(from, sizeof(T), host::kRead);
  return *from;
}
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
// A limit of 0 forces the two-pass kernels.
inline int64_t most_shared_memory() { return host::limit("SPADE_FAST_HOST_SHARED", kSharedMemory); }
inline int64_t processors() { return host::limit("SPADE_FAST_HOST_PROCESSORS", 2); }
constexpr int64_t kAlwaysKept = 0;  // so that small tests exceed it

template <typename Kernel>
bool knows_clusters(Kernel*) {
  return host::limit("SPADE_FAST_HOST_CLUSTERS", 1) != 0;
}

template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int64_t blocks, int64_t cluster, dim3 threads,
                     int64_t shared, Stream, Arguments... arguments) {
  if (blocks == 0) return;
  ++host::launches;
  host::launch(blocks, cluster, threads, shared, [=]() HOST_UNWATCHED { kernel(arguments...); });
}

inline void download(void* to, const void* from, int64_t bytes, Stream) {
  ++host::launches, ++host::waits;
  std::memcpy(to, from, bytes);
}
inline void set_bytes(void* to, int value, int64_t bytes, Stream) {
  ++host::launches;
  std::memset(to, value, bytes);
}

inline char* shared_memory() { return host::shared_memory(); }
inline void wait_for_cluster(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::wait_for_cluster(file, line);
}
inline float in_block(uint32_t block, const float* shared) { return host::in_block(block, shared); }
inline void copy_async(void* shared, const void* global) { host::copy_async(shared, global); }
inline void copy_async_or_zeros(void* shared, const void* global, bool exists) {
  host::copy_async(shared, exists ? global : nullptr);
}
inline void end_group_of_copies() { host::end_group_of_copies(); }
template <int kGroups>
void wait_for_copies_but(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::wait_for_copies_but(kGroups, file, line);
}
inline void wait_for_copies(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::end_group_of_copies(), host::wait_for_copies_but(0, file, line);
}
inline int32_t add_atomically(int32_t* to, int32_t number) { return atomicAdd(to, number); }
inline float from_half(uint32_t bits) {
  return c10::Half(static_cast<uint16_t>(bits), c10::Half::from_bits());
}
inline uint32_t to_half(float value) { return c10::Half(value).x; }
inline uint32_t to_bfloat16(float value) { return c10::BFloat16(value).x; }
inline uint32_t to_halves(float first, float second) {
  return to_half(first) | to_half(second) << 16;
}
inline uint32_t to_bfloat16s(float first, float second) {
  return to_bfloat16(first) | to_bfloat16(second) << 16;
}

}  // namespace spade_fast
