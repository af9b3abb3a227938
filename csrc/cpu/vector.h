// Runs one loop body in every instruction set, chosen at run time: base, AVX2, AVX-512, and AVX-512
// with products of bfloat16, which only matrix.cpp uses.
//
// All arithmetic is in Sum, float or double (elements.h converts other dtypes). A kernel is a type
// with a static, always inlined `run(arguments…)`. `vectorised<Kernel>(arguments…)` calls it from a
// wrapper that is compiled for the instruction set in use, so that the compiler vectorises the same
// body once for each. A body may call only always-inlined functions and must not contain lambdas,
// because those would be compiled for the base alone.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace spade_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

enum class InstructionSet { base, avx2, avx512, avx512_bf16 };

// The instruction set in use: the best that this processor supports, unless another was chosen.
// Defined in module.cpp.
InstructionSet instruction_set();

#if defined(__x86_64__)
#define SPADE_FAST_AVX2 "avx2,fma,f16c,bmi,bmi2,lzcnt,movbe,popcnt"
template <typename Kernel, typename... Arguments>
__attribute__((target(SPADE_FAST_AVX2
                      ",avx512f,avx512bw,avx512cd,avx512dq,avx512vl,prefer-vector-width=512"))) auto
run_avx512(Arguments... arguments) {
  return Kernel::run(arguments...);
}
template <typename Kernel, typename... Arguments>
__attribute__((target(SPADE_FAST_AVX2))) auto run_avx2(Arguments... arguments) {
  return Kernel::run(arguments...);
}
#endif

template <typename Kernel, typename... Arguments>
auto run_base(Arguments... arguments) {
  return Kernel::run(arguments...);
}

template <typename Kernel, typename... Arguments>
auto vectorised(Arguments... arguments) {
#if defined(__x86_64__)
  if (instruction_set() >= InstructionSet::avx512) return run_avx512<Kernel>(arguments...);
  if (instruction_set() == InstructionSet::avx2) return run_avx2<Kernel>(arguments...);
#endif
  return run_base<Kernel>(arguments...);
}

// Columns are counted in units of 64 bytes, a multiple of every instruction set's vector.
template <typename Sum>
constexpr int64_t kUnit = 64 / sizeof(Sum);

template <typename Sum>
constexpr int64_t units(int64_t columns) {
  return (columns + kUnit<Sum> - 1) / kUnit<Sum>;
}

// A vector of kBytes without alignment; at(data, v) is vector number v from data on.
template <typename Sum, int kBytes>
struct Vectors {
  typedef Sum Vector __attribute__((vector_size(kBytes), aligned(alignof(Sum)), may_alias));
  static constexpr int kOfUnit = 64 / kBytes;

  static ALWAYS_INLINE Vector& at(Sum* data, int64_t v) {
    return reinterpret_cast<Vector*>(data)[v];
  }
  static ALWAYS_INLINE const Vector& at(const Sum* data, int64_t v) {
    return reinterpret_cast<const Vector*>(data)[v];
  }
};

// Calls Kernel<Sum, kBytes>::run(arguments…) with the vector width of the instruction set in use.
template <template <typename, int> class Kernel, typename Sum, typename... Arguments>
void in_vectors(Arguments... arguments) {
#if defined(__x86_64__)
  if (instruction_set() >= InstructionSet::avx512) return run_avx512<Kernel<Sum, 64>>(arguments...);
  if (instruction_set() == InstructionSet::avx2) return run_avx2<Kernel<Sum, 32>>(arguments...);
#endif
  run_base<Kernel<Sum, 16>>(arguments...);
}

// Elements per block: a kernel's intermediate values for one block stay in the L1 cache.
constexpr int64_t kBlock = 256;

template <typename To, typename From>
ALWAYS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Loads widen and stores round to nearest even, in bit arithmetic: the compiler vectorises that,
// but not calls to conversion functions.
ALWAYS_INLINE float load(const float& x) { return x; }
ALWAYS_INLINE double load(const double& x) { return x; }
ALWAYS_INLINE float load(const BFloat16& x) {
  return bit_cast<float>(static_cast<uint32_t>(x.x) << 16);
}
ALWAYS_INLINE float load(const Half& x) {
  const uint32_t sign = static_cast<uint32_t>(x.x & 0x8000) << 16, magnitude = x.x & 0x7fff;
  // Subnormal numbers are multiples of 2⁻²⁴. The exponent bias of the others is 112 less than a
  // float's. Magnitudes from 0x7c00 on are infinity and NaN.
  const uint32_t subnormal =
      bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t normal = (magnitude << 13) + (magnitude < 0x7c00 ? 112u << 23 : 224u << 23);
  return bit_cast<float>(sign | (magnitude < 0x0400 ? subnormal : normal));
}

ALWAYS_INLINE void store(float& y, float value) { y = value; }
ALWAYS_INLINE void store(double& y, double value) { y = value; }
ALWAYS_INLINE void store(BFloat16& y, float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  y.x = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}
ALWAYS_INLINE void store(Half& y, float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  y.x = static_cast<uint16_t>((bits >> 16 & 0x8000) | half);
}

}  // namespace spade_fast
