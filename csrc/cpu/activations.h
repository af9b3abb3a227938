// Activations and their derivatives, elementwise, and the packed sign bits that the derivatives of
// ReLU and leaky ReLU need.
#pragma once

#include <cmath>
#include <cstring>

#include "../common/activation.h"
#include "vector.h"

namespace spade_fast {

// exp(x), accurate to about two roundings. It stays at exp(−87.3) below −87.3, and is infinite from
// 88.38 on, a little before float32 ends. NaN for NaN.
ALWAYS_INLINE float exponential(float x) {
  x = x > 88.7f ? 88.7f : x;
  x = x < -87.3f ? -87.3f : x;
  // Adding 1.5·2²³ leaves the nearest integer to x/ln 2 in the low bits of the mantissa.
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float power = shifted - 12582912.0f;
  // The remainder x − power·ln 2, with ln 2 in two parts.
  const float r = (x - power * 0.693359375f) + power * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * r + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  sum = sum * r * r + r + 1.0f;
  return sum * bit_cast<float>((bit_cast<uint32_t>(shifted) - 0x4b400000u + 127u) << 23);
}
ALWAYS_INLINE double exponential(double x) { return std::exp(x); }

// values[i] = act(values[i]).
template <typename Sum>
ALWAYS_INLINE void activate(int64_t count, Activation activation, Sum negative_slope, Sum* values) {
  if (activation == Activation::relu) {
#pragma omp simd
    // `<=` so that NaN stays NaN.
    for (int64_t i = 0; i < count; ++i) values[i] = values[i] <= 0 ? Sum(0) : values[i];
  } else if (activation == Activation::leaky_relu) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      values[i] = values[i] > 0 ? values[i] : values[i] * negative_slope;
  } else if (activation == Activation::silu) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) values[i] = values[i] / (1 + exponential(-values[i]));
  }
}

// Packs one bit per value, in the order that contract.py defines; and unpacks bits to bytes that
// are zero or not.
template <typename Sum>
ALWAYS_INLINE void pack_signs(int64_t count, Activation activation, const Sum* values,
                              uint8_t* signs) {
  uint8_t positive[kBlock];
  if (activation == Activation::relu) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) positive[i] = !(values[i] <= 0);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) positive[i] = values[i] > 0;
  }
  for (int64_t i = count; i % 8 != 0; ++i) positive[i] = 0;
  for (int64_t byte = 0; byte * 8 < count; ++byte) {
    uint64_t eight;
    std::memcpy(&eight, positive + byte * 8, 8);
    signs[byte] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
  }
}

ALWAYS_INLINE void unpack_signs(int64_t count, const uint8_t* signs, uint8_t* positive) {
  for (int64_t byte = 0; byte * 8 < count; ++byte) {
    const uint64_t eight = signs[byte] * 0x0101010101010101u & 0x8040201008040201u;
    std::memcpy(positive + byte * 8, &eight, 8);
  }
}

// g[i] = dy[i]·act'(…), from the signs, or for SiLU from the activation's arguments `values`.
template <typename Sum>
ALWAYS_INLINE void through_activation(int64_t count, Activation activation, Sum negative_slope,
                                      const uint8_t* signs, const Sum* values, const Sum* dy,
                                      Sum* g) {
  if (activation == Activation::relu || activation == Activation::leaky_relu) {
    uint8_t positive[kBlock];
    unpack_signs(count, signs, positive);
    if (activation == Activation::relu) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) g[i] = positive[i] ? dy[i] : Sum(0);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) g[i] = positive[i] ? dy[i] : dy[i] * negative_slope;
    }
  } else if (activation == Activation::silu) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const Sum sigmoid = 1 / (1 + exponential(-values[i]));
      g[i] = dy[i] * (sigmoid * (1 + values[i] * (1 - sigmoid)));
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) g[i] = dy[i];
  }
}

}  // namespace spade_fast
