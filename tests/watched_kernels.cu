// Small kernels, each in a correct version and in one with a fault that the watch of cuda_on_host.h
// must find.

#include "../csrc/cuda/device.h"

#include <exception>
#include <string>

namespace spade_fast {
namespace {

struct alignas(16) Memory {
  float numbers[128], copied[128];
};

float* shared_numbers() { return reinterpret_cast<float*>(shared_memory()); }
unsigned place() { return blockIdx.x * blockDim.x + threadIdx.x; }

void read_what_others_write(Memory& memory, bool wrong) {
  shared_numbers()[threadIdx.x] = 1;
  if (!wrong) __syncthreads();
  memory.numbers[place()] = shared_numbers()[threadIdx.x ^ 32];
}

void write_what_others_read(Memory& memory, bool wrong) {
  shared_numbers()[threadIdx.x] = 1;
  __syncthreads();
  memory.numbers[place()] = shared_numbers()[threadIdx.x ^ 32];
  if (!wrong) __syncthreads();
  shared_numbers()[threadIdx.x] = 2;
}

void mistake_a_shuffle_for_a_wait(Memory& memory, bool wrong) {
  shared_numbers()[threadIdx.x] = 1;
  wrong ? void(__shfl_xor_sync(~0u, 0, 1)) : __syncwarp();
  memory.numbers[place()] = shared_numbers()[threadIdx.x ^ 1];
}

void mistake_a_warp_for_the_block(Memory& memory, bool wrong) {
  shared_numbers()[threadIdx.x] = 1;
  __syncwarp();
  memory.numbers[place()] = shared_numbers()[threadIdx.x ^ (wrong ? 32 : 1)];
}

void write_where_other_blocks_do(Memory& memory, bool wrong) {
  memory.numbers[wrong ? threadIdx.x : place()] = 1;
}

void mistake_a_block_for_the_grid(Memory& memory, bool wrong) {
  const float before = memory.numbers[wrong ? 0 : blockIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) memory.numbers[blockIdx.x] = before + 1;
}

void mistake_a_block_for_the_cluster(Memory& memory, bool wrong) {
  shared_numbers()[threadIdx.x] = 1;
  wrong ? __syncthreads() : wait_for_cluster();
  memory.numbers[place()] = in_block(1 - blockIdx.x, shared_numbers() + threadIdx.x);
  wait_for_cluster();
}

void end_while_others_read(Memory& memory, bool wrong) {
  shared_numbers()[threadIdx.x] = 1;
  wait_for_cluster();
  memory.numbers[place()] = in_block(1 - blockIdx.x, shared_numbers() + threadIdx.x);
  if (!wrong) wait_for_cluster();
}

void write_what_others_add_to(Memory& memory, bool wrong) {
  if (wrong && threadIdx.x == 5) memory.numbers[0] = 1;
  atomicAdd(memory.numbers, 1.0f);
}

void read_what_others_set(Memory& memory, bool wrong) {
  if (place() == 0) *static_cast<volatile float*>(memory.copied) = 1;
  float number = *static_cast<volatile float*>(memory.copied);
  if (wrong) number += memory.copied[0];
  memory.numbers[place()] = number;
}

void read_what_others_copy(Memory& memory, bool wrong) {
  if (threadIdx.x < 16)
    copy_async(shared_numbers() + 4 * threadIdx.x, memory.copied + 4 * threadIdx.x);
  wait_for_copies();
  if (!wrong) __syncthreads();
  memory.numbers[place()] = shared_numbers()[threadIdx.x];
}

void go_beyond_shared_memory(Memory&, bool wrong) { shared_numbers()[threadIdx.x + wrong] = 1; }

void read_what_nothing_wrote(Memory& memory, bool wrong) {
  if (!wrong) shared_numbers()[threadIdx.x] = 1;
  memory.numbers[place()] = shared_numbers()[threadIdx.x] > 0 ? 1.0f : 0.0f;
}

void load_from_anywhere(Memory& memory, bool wrong) {
  if (place() == 0)
    *reinterpret_cast<uint4*>(memory.numbers) =
        __ldg(reinterpret_cast<const uint4*>(memory.copied + wrong));
}

void leave_one_waiting(Memory&, bool wrong) {
  if (!wrong || threadIdx.x == 5) __syncthreads();
}

void read_a_copy_too_early(Memory& memory, bool wrong) {
  if (threadIdx.x >= 16) return;
  copy_async(shared_numbers() + 4 * threadIdx.x, memory.copied + 4 * threadIdx.x);
  if (!wrong) wait_for_copies();
  memory.numbers[place()] = shared_numbers()[4 * threadIdx.x];
}

void read_a_group_too_early(Memory& memory, bool wrong) {
  if (threadIdx.x >= 8) return;
  for (unsigned first : {4 * threadIdx.x, 32 + 4 * threadIdx.x}) {
    copy_async(shared_numbers() + first, memory.copied + first);
    end_group_of_copies();
  }
  wait_for_copies_but<1>();
  memory.numbers[place()] = shared_numbers()[4 * threadIdx.x + (wrong ? 32 : 0)];
}

void read_a_group_that_has_not_ended(Memory& memory, bool wrong) {
  if (threadIdx.x >= 16) return;
  copy_async_or_zeros(shared_numbers() + 4 * threadIdx.x, nullptr, false);
  if (!wrong) end_group_of_copies();
  wait_for_copies_but<0>();
  memory.numbers[place()] = shared_numbers()[4 * threadIdx.x];
}

struct Kernel {
  const char* name;
  void (*run)(Memory&, bool);
  int64_t cluster = 1;
};

// One per line, because test_waits.py reads them so.
// clang-format off
#define KERNEL(name, ...) \
  { #name, name, ##__VA_ARGS__ }
const Kernel kKernels[] = {
    KERNEL(read_what_others_write),
    KERNEL(write_what_others_read),
    KERNEL(mistake_a_shuffle_for_a_wait),
    KERNEL(write_where_other_blocks_do),
    KERNEL(mistake_a_block_for_the_grid),
    KERNEL(mistake_a_block_for_the_cluster, 2),
    KERNEL(end_while_others_read, 2),
    KERNEL(write_what_others_add_to),
    KERNEL(read_what_others_set),
    KERNEL(mistake_a_warp_for_the_block),
    KERNEL(read_what_others_copy),
    KERNEL(go_beyond_shared_memory),
    KERNEL(read_what_nothing_wrote),
    KERNEL(load_from_anywhere),
    KERNEL(leave_one_waiting),
    KERNEL(read_a_copy_too_early),
    KERNEL(read_a_group_too_early),
    KERNEL(read_a_group_that_has_not_ended),
};
// clang-format on

}  // namespace

// Runs a kernel in two blocks of 64 threads. Returns the fault that was found, or an empty string.
extern "C" const char* run_kernel(const char* name, bool wrong) {
  static std::string found;
  found = "there is no such kernel";
  Memory memory = {};
  try {
    for (const Kernel& kernel : kKernels) {
      if (std::string(name) != kernel.name) continue;
      found.clear();
      host::launch(2, kernel.cluster, dim3(64), 256, [&] { kernel.run(memory, wrong); });
    }
  } catch (const std::exception& error) {
    found = error.what();
  }
  for (const float number : memory.numbers) {
    if (std::isnan(number)) found = "a number is NaN";
  }
  return found.c_str();
}

}  // namespace spade_fast
