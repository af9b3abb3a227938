// Products of fragments on tensor cores. For tests a host implementation takes their place.
#pragma once

#include "operands.h"

namespace spade_fast {

#ifdef __CUDACC__
// ldmatrix: loads four 8 × 8 matrices of 16-bit numbers from shared memory. Lane 8·i + r passes the
// address of row r of matrix i, and receives from each matrix numbers 2·(lane % 4) and the next one
// of row lane / 4.
__device__ inline void load_matrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

// sums [16, 8] += one [16, 16] · other [8, 16]ᵀ, in fragments as load_matrices loads them: of
// `one`, rows 0 to 7 and 8 to 15 of the first half of the columns, then of the second; of `other`,
// both halves. A lane has the sums of row lane / 4, columns 2·(lane % 4) and the next, and the same
// columns 8 rows below.
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
