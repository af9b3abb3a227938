// Products of small matrices on tensor cores. Tests put a host in their place.
#pragma once

#include "operands.h"

namespace spade_fast {

#ifdef __CUDACC__
// Four matrices of 8 rows of 8 numbers of 16 bits in shared memory: thread 8·i + r of a warp has
// the address of row r of matrix i, and each thread gets the numbers 2·(thread % 4) and the next of
// row thread / 4 of all four.
__device__ inline void load_matrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

// sums [16, 8] += one [16, 16] · other [8, 16]ᵀ, as load_matrices gives them: rows 0 to 7 and 8 to
// 15 of the first half of one's columns, then of the second; both halves of other's. A thread has
// the sums of row thread / 4, columns 2·(thread % 4) and the next, and those 8 rows below.
template <Type kType>
__device__ void multiply_add(float (&sums)[4], const uint32_t (&one)[4], uint32_t other_first,
                             uint32_t other_second) {
  if (kType == Type::bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(one[0]), "r"(one[1]), "r"(one[2]), "r"(one[3]), "r"(other_first), "r"(other_second));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(one[0]), "r"(one[1]), "r"(one[2]), "r"(one[3]), "r"(other_first), "r"(other_second));
  }
}
#elif defined(SPADE_FAST_ON_HOST)
inline void load_matrices(uint32_t (&words)[4], const void* row) {
  uint64_t rows[32];
  host::gather(reinterpret_cast<uintptr_t>(row), rows);
  const unsigned lane = host::lane();
  for (unsigned i = 0; i < 4; ++i)
    words[i] =
        reinterpret_cast<const uint32_t*>(static_cast<uintptr_t>(rows[8 * i + lane / 4]))[lane % 4];
}

template <Type kType>
void multiply_add(float (&sums)[4], const uint32_t (&one)[4], uint32_t other_first,
                  uint32_t other_second) {
  const auto both = [](uint32_t first, uint32_t second) {
    return static_cast<uint64_t>(second) << 32 | first;
  };
  uint64_t of_one[2][32], of_other[32];  // the halves of one's columns
  for (int half = 0; half < 2; ++half)
    host::gather(both(one[2 * half], one[2 * half + 1]), of_one[half]);
  host::gather(both(other_first, other_second), of_other);
  const auto number = [](uint64_t words, int which) {
    const uint32_t bits = words >> 16 * which & 0xffff;
    return kType == Type::bfloat16 ? __uint_as_float(bits << 16) : from_half(bits);
  };
  const unsigned lane = host::lane();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4, below = i / 2, column = 2 * (lane % 4) + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned half = k / 8, pair = k % 8 / 2;
      sums[i] += number(of_one[half][4 * row + pair], 2 * below + k % 2) *
                 number(of_other[4 * column + pair], 2 * half + k % 2);
    }
  }
}
#endif

}  // namespace spade_fast
