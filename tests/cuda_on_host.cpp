// The threads of CUDA blocks as fibers, and the watch over their memory accesses: cuda_on_host.h
// describes them. Never compile this with -fsanitize=thread: it implements the functions that this
// option makes the compiler insert into the kernels.

#undef _FORTIFY_SOURCE  // it takes a jump to another stack for an error

#include "cuda_on_host.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <filesystem>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace host {
namespace {

struct Group {  // threads that share a barrier
  unsigned size = 0, arrived = 0, round = 0;
};

struct Block {
  unsigned index;
  Group threads, warps[32], exchanging[32];  // the last two: per warp
  uint64_t exchanged[1024];
};

struct Copy {
  void* to;
  const void* from;  // null for zeros
};

struct Fiber : Thread {
  ucontext_t beginning;
  jmp_buf place;  // where it continues
  std::unique_ptr<char[]> stack;
  Block* of;
  bool begun, done;
  Group* awaited;
  unsigned round;                        // the group's round when the fiber began to wait
  std::deque<std::vector<Copy>> copies;  // groups; the last one is still open

  bool ready() const { return !done && (awaited == nullptr || awaited->round != round); }
};

constexpr size_t kStack = 256 << 10, kShared = 227 << 10, kCopy = 16;
// The distance between the blocks' shared memories. Its last byte is written when the block ends.
constexpr size_t kStride = kShared + 64;
jmp_buf scheduler;
std::vector<Fiber> fibers;
std::vector<Block> blocks;
std::vector<uint4> arena;  // the blocks' shared memory
std::function<void()> body;
Group cluster;
int64_t shared_bytes, largest_cluster = 0;  // the largest launched since the last query
std::string left_out, fault;

Fiber& me() { return static_cast<Fiber&>(*current); }
char* shared_of(const Block& block) {
  return reinterpret_cast<char*>(arena.data()) + (&block - blocks.data()) * kStride;
}
const char* running(const Block& block) { return shared_of(block) + kStride - 1; }

std::string name(unsigned thread, unsigned block) {
  return "thread " + std::to_string(thread) + " of block " + std::to_string(block);
}

std::string name(const Thread& thread) { return name(thread.number, thread.block.x); }

// Jumps, because swapcontext makes a system call each time.
void to_scheduler() {
  if (_setjmp(me().place) == 0) _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.beginning);
}

// Records the fault and leaves the current thread; the launch then ends.
void fail(const std::string& what) {
  fault = name(*current) + " " + what, watching = true;
  to_scheduler();
}

// The watch. Which accesses are ordered follows from the number of barriers that the warp, the
// block and the cluster have passed, because all threads of each pass every one.

enum Scope : uint8_t { nobody, one_thread, one_warp, one_block, one_cluster, everybody };

// The accesses to a byte that no barrier has ordered with each other: one of them, and the smallest
// scope that contains all their threads.
struct Access {
  Scope scope = nobody;
  bool atomic;  // whether all of them are
  uint16_t thread;
  uint32_t block, rounds[3];  // of the warp, the block and the cluster

  static Access mine(bool atomic) {
    const Block& block = *me().of;
    const uint16_t number = static_cast<uint16_t>(current->number);
    return {one_thread,
            atomic,
            number,
            block.index,
            {block.warps[number / 32].round, block.threads.round, cluster.round}};
  }
  // The smallest scope that also contains the current thread.
  Scope with(const Access& mine) const {
    const unsigned together = cluster.size / me().of->threads.size;
    const bool same_warp = thread / 32 == mine.thread / 32;
    const Scope both = block / together != mine.block / together ? everybody
                       : block != mine.block                     ? one_cluster
                       : !same_warp                              ? one_block
                       : thread != mine.thread                   ? one_warp
                                                                 : one_thread;
    return std::max(scope, both);
  }
  bool waited_for(const Access& mine) const {
    if (scope == nobody) return true;
    const Scope both = with(mine);
    return (both <= one_warp && mine.rounds[0] > rounds[0]) ||
           (both <= one_block && mine.rounds[1] > rounds[1]) ||
           (both <= one_cluster && mine.rounds[2] > rounds[2]);
  }
  bool conflicts(const Access& mine) const {
    return !waited_for(mine) && with(mine) > one_thread && !(atomic && mine.atomic);
  }
  void add(const Access& mine) {
    if (waited_for(mine)) {
      *this = mine;
    } else {
      scope = with(mine), atomic &= mine.atomic;
    }
  }
};

struct Cell {
  uint32_t when = 0;
  Access reads, writes;
};

constexpr uintptr_t kPage = 1024, kMostPages = 4096;
std::unordered_map<uintptr_t, std::vector<Cell>> cells;  // one per byte of a page
std::pair<uintptr_t, Cell*> recent[64];                  // the pages that were used last
// Global memory is watched within a launch, shared memory within a cluster.
uint32_t moments = 0, this_launch, this_cluster;

Cell& cell_at(uintptr_t address) {
  auto& [page, first] = recent[address / kPage % 64];
  if (first == nullptr || page != address / kPage) {
    std::vector<Cell>& all = cells[page = address / kPage];
    if (all.empty()) all.resize(kPage);
    first = all.data();
  }
  return first[address % kPage];
}

void forget_old_pages() {
  if (cells.size() < kMostPages) return;
  cells.clear();
  std::fill(std::begin(recent), std::end(recent), std::pair<uintptr_t, Cell*>());
}

bool is_shared(uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(arena.data()) < arena.size() * sizeof(uint4);
}

void note_bytes(const void* address, size_t bytes, int kind) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(address);
  const bool shared = is_shared(first), writes = kind & kWrite;
  const uint32_t when = shared ? this_cluster : this_launch;
  const Access mine = Access::mine(kind & kAtomic);
  for (size_t i = 0; i < bytes; ++i) {
    Cell& cell = cell_at(first + i);
    if (cell.when != when) cell = {when};
    for (const Access* other : {&cell.writes, writes ? &cell.reads : &cell.writes}) {
      if (!other->conflicts(mine)) continue;
      const std::string others =
          name(other->thread, other->block) + (other->scope > one_thread ? " (among others)" : "");
      fail((writes ? "writes " : "reads ") + std::string(shared ? "shared memory" : "memory") +
           " that " + others + (other == &cell.writes ? " writes" : " reads") +
           " without a wait in between");
    }
    if (shared && kind == kRead && cell.writes.scope == nobody)
      fail("reads shared memory that nothing has written");
    (writes ? cell.writes : cell.reads).add(mine);
  }
}

// Refuses places that the device could not access.
void check_place(const void* address, size_t bytes, size_t divisor) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(address),
                  mine = reinterpret_cast<uintptr_t>(shared_memory());
  if (is_shared(first) && (first < mine || first + bytes > mine + shared_bytes))
    fail("accesses an address beyond its block's shared memory");
  if (first % divisor != 0)
    fail("accesses an address that is not a multiple of " + std::to_string(divisor));
}

// The fibers.

void run() {
  body();
  if (current->number == 0 && watching) note_bytes(running(*me().of), 1, kWrite);
  me().done = true;
  to_scheduler();
}

void wait_for(Group& group) {
  me().awaited = &group, me().round = group.round;
  if (++group.arrived == group.size) group.arrived = 0, ++group.round;
  to_scheduler();
}

bool is_left_out(const char* file, int line) {
  if (left_out.empty()) return false;
  return std::filesystem::path(file).filename().string() + ":" + std::to_string(line) == left_out;
}

class Order {  // of warps and their lanes, or of clusters
 public:
  Order() {
    const char* given = std::getenv("SPADE_FAST_HOST_ORDER");
    const std::string order = given != nullptr ? given : "forward";
    reverse_ = order == "reverse", random_ = !reverse_ && order != "forward";
    if (random_) numbers_.seed(std::stoul(order));
  }
  std::vector<int64_t> of(int64_t count) {
    std::vector<int64_t> order(count);
    for (int64_t i = 0; i < count; ++i) order[i] = reverse_ ? count - 1 - i : i;
    if (random_) std::shuffle(order.begin(), order.end(), numbers_);
    return order;
  }
  unsigned lanes() { return random_ ? numbers_() % 32 : reverse_ ? 31 : 0; }  // XORed with lane
  int64_t some(int64_t count) { return random_ ? 1 + numbers_() % count : count; }

 private:
  bool reverse_, random_;
  std::mt19937 numbers_;
};

void start(Fiber& fiber, Block& block, unsigned number) {
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  getcontext(&fiber.beginning);
  fiber.beginning.uc_stack.ss_sp = fiber.stack.get(), fiber.beginning.uc_stack.ss_size = kStack,
  fiber.beginning.uc_link = nullptr;
  makecontext(&fiber.beginning, &run, 0);
  fiber.index = dim3(number % threads_of_block.x, number / threads_of_block.x),
  fiber.block = dim3(block.index);
  fiber.number = number, fiber.shared = shared_of(block), fiber.of = &block;
  fiber.begun = fiber.done = false, fiber.awaited = nullptr, fiber.copies.assign(1, {});
}

// Runs `together` blocks from `first` on. In each round some of the warps, in some order, run as
// far as they can.
void run_cluster(int64_t first, unsigned together, Order& order) {
  const unsigned count = threads_of_block.x * threads_of_block.y;
  cluster = {together * count}, this_cluster = ++moments;
  for (unsigned i = 0; i < together; ++i) {
    Block& block = blocks[i];
    block.index = static_cast<unsigned>(first + i), block.threads = {count};
    std::memset(shared_of(block), 0xff, shared_bytes);
    for (unsigned warp = 0; warp < count / 32; ++warp)
      block.warps[warp] = block.exchanging[warp] = {32};
    for (unsigned number = 0; number < count; ++number)
      start(fibers[i * count + number], block, number);
  }
  for (bool progress = true; progress && fault.empty();) {
    progress = false;
    const std::vector<int64_t> warps = order.of(cluster.size / 32);
    const int64_t running_now = order.some(warps.size());
    const unsigned lanes = order.lanes();
    for (size_t i = 0; i < warps.size(); ++i) {
      for (unsigned lane = 0; lane < 32; ++lane) {
        Fiber& fiber = fibers[warps[i] * 32 + (lane ^ lanes)];
        if (!fiber.ready()) continue;
        progress = true, current = &fiber;
        if (static_cast<int64_t>(i) < running_now && fault.empty()) resume(fiber);
      }
    }
  }
  for (unsigned i = 0; i < cluster.size && fault.empty(); ++i) {
    if (!fibers[i].done) fault = name(fibers[i]) + " waits forever";
  }
}

}  // namespace

void gather(uint64_t value, uint64_t (&of_lanes)[32]) {
  Block& block = *me().of;
  const unsigned warp = current->number / 32;
  block.exchanged[current->number] = value;
  wait_for(block.exchanging[warp]);
  std::copy_n(&block.exchanged[warp * 32], 32, of_lanes);
  wait_for(block.exchanging[warp]);
}

void wait_for_warp(const char* file, int line) {
  if (!is_left_out(file, line)) wait_for(me().of->warps[current->number / 32]);
}

void wait_for_block(const char* file, int line) {
  if (!is_left_out(file, line)) wait_for(me().of->threads);
}

void wait_for_cluster(const char* file, int line) {
  if (!is_left_out(file, line)) wait_for(cluster);
}

void copy_async(void* shared, const void* global) {
  if (global != nullptr) note(global, kCopy, kRead);
  note(shared, kCopy, kWrite);
  std::memset(shared, 0xff, kCopy);
  me().copies.back().push_back({shared, global});
}

void end_group_of_copies() { me().copies.emplace_back(); }

// The copies that are waited for are made only now, the latest moment that CUDA allows.
void wait_for_copies_but(size_t groups, const char* file, int line) {
  if (is_left_out(file, line)) return;
  for (; me().copies.size() - 1 > groups; me().copies.pop_front()) {
    for (const Copy& copy : me().copies.front()) {
      note(copy.to, kCopy, kWrite);
      copy.from != nullptr ? std::memcpy(copy.to, copy.from, kCopy)
                           : std::memset(copy.to, 0, kCopy);
    }
  }
}

float in_block(uint32_t block, const float* shared) {
  const float* there = reinterpret_cast<const float*>(
      shared_of(blocks[block]) + (reinterpret_cast<const char*>(shared) - shared_memory()));
  if (watching) {
    check_place(shared, sizeof(float), sizeof(float));
    watching = false;
    note_bytes(there, sizeof(float), kRead);
    // The byte is unwritten while that block runs.
    if (&blocks[block] != me().of) note_bytes(running(blocks[block]), 1, kRead | kAtomic);
    watching = true;
  }
  return *there;
}

void watch(const void* address, size_t bytes, int kind, size_t divisor) {
  if (!watching || current == nullptr ||
      static_cast<size_t>(static_cast<const char*>(address) - me().stack.get()) < kStack)
    return;
  check_place(address, bytes, divisor);
  watching = false;  // not for the watch's own accesses
  note_bytes(address, bytes, kind);
  watching = true;
}

int64_t limit(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::atoll(value) : otherwise;
}

void launch(int64_t count, int64_t together, dim3 threads, int64_t shared,
            const std::function<void()>& kernel) {
  if (threads.x * threads.y % 32 != 0 || threads.x * threads.y > 1024)
    throw std::runtime_error("a block does not consist of whole warps");
  if (shared > static_cast<int64_t>(kShared))
    throw std::runtime_error("a block has too much shared memory");
  if (count % together != 0) throw std::runtime_error("the blocks do not form whole clusters");
  const char* without = std::getenv("SPADE_FAST_HOST_WITHOUT");
  left_out = without != nullptr ? without : "", fault.clear();
  largest_cluster = std::max(largest_cluster, together);
  body = kernel, threads_of_block = threads, blocks_of_grid = dim3(static_cast<unsigned>(count)),
  shared_bytes = shared;
  if (blocks.size() < static_cast<size_t>(together))
    blocks.resize(together), arena.resize(together * kStride / sizeof(uint4));
  if (fibers.size() < together * threads.x * threads.y)
    fibers.resize(together * threads.x * threads.y);
  forget_old_pages();
  this_launch = ++moments;
  Order order;
  for (const int64_t first : order.of(count / together)) {
    if (fault.empty()) run_cluster(first * together, static_cast<unsigned>(together), order);
  }
  current = nullptr;
  if (!fault.empty()) throw std::runtime_error(fault);
}

}  // namespace host

extern "C" {

int64_t host_largest_cluster() { return std::exchange(host::largest_cluster, 0); }
int64_t host_launches() { return std::exchange(host::launches, 0); }
int64_t host_waits() { return std::exchange(host::waits, 0); }

// The functions that the compiler calls at each access of instrumented code.
#define HOST_WATCH(bytes)                                                                       \
  void __tsan_read##bytes(void* address) { host::watch(address, bytes, host::kRead, bytes); }   \
  void __tsan_write##bytes(void* address) { host::watch(address, bytes, host::kWrite, bytes); } \
  void __tsan_volatile_read##bytes(void* address) {                                             \
    host::watch(address, bytes, host::kAtomic, bytes);                                          \
  }                                                                                             \
  void __tsan_volatile_write##bytes(void* address) {                                            \
    host::watch(address, bytes, host::kWrite | host::kAtomic, bytes);                           \
  }                                                                                             \
  void __tsan_unaligned_read##bytes(void* address) {                                            \
    host::watch(address, bytes, host::kRead, 1);                                                \
  }                                                                                             \
  void __tsan_unaligned_write##bytes(void* address) {                                           \
    host::watch(address, bytes, host::kWrite, 1);                                               \
  }
HOST_WATCH(1)
HOST_WATCH(2)
HOST_WATCH(4)
HOST_WATCH(8)
HOST_WATCH(16)
void __tsan_read_range(void* address, size_t bytes) { host::watch(address, bytes, host::kRead, 1); }
void __tsan_write_range(void* address, size_t bytes) {
  host::watch(address, bytes, host::kWrite, 1);
}
// Whether a static variable is already initialised.
char __tsan_atomic8_load(const volatile char* address, int) { return *address; }
void __tsan_init() { host::watching = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

}  // extern "C"
