// Elements in memory, and V of them at a time in a thread's registers: 16 bytes if all tensors have
// elements of the same size, with V = 8 if all have 16 bits, else V = 4. Dtypes are tested at run
// time: the kernels are bound by memory, so that costs nothing.
#pragma once

#include "operands.h"

namespace spade_fast {

// V elements `step` apart, of which the first `count` exist. `vector`: they are contiguous, at an
// address divisible by 16.
struct Span {
  int64_t step;
  int count;
  bool vector;
};

// Elements in their memory format, packed.
struct alignas(16) Raw {
  uint32_t words[4];
};

template <int V>
__device__ bool is_float(Type type) {
  return V == 4 && type == Type::float32;
}

template <int V>
__device__ void set(Raw* raw, int k, Type type, const char* element) {
  if (is_float<V>(type)) {
    raw->words[k] = __ldg(reinterpret_cast<const uint32_t*>(element));
  } else {
    raw->words[k / 2] |= static_cast<uint32_t>(__ldg(reinterpret_cast<const uint16_t*>(element)))
                         << k % 2 * 16;
  }
}

// Missing elements are zeros.
template <int V>
__device__ Raw load(const char* first, Type type, Span span) {
  Raw raw = {};
  if (span.vector && span.count == V) {
    if (V == 8 || type == Type::float32) {
      const uint4 words = __ldg(reinterpret_cast<const uint4*>(first));
      raw = {{words.x, words.y, words.z, words.w}};
    } else {
      const uint2 words = __ldg(reinterpret_cast<const uint2*>(first));
      raw = {{words.x, words.y}};
    }
    return raw;
  }
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (k < span.count) set<V>(&raw, k, type, first + k * span.step * (is_float<V>(type) ? 4 : 2));
  }
  return raw;
}

// The same to shared memory; complete after wait_for_copies().
template <int V>
__device__ void load_async(Raw* to, const char* first, Type type, Span span) {
  if (span.vector && span.count == V && (V == 8 || type == Type::float32))
    return copy_async(to, first);
  const Raw raw = load<V>(first, type, span);
  *to = raw;  // as one access, which the tests can watch
}

template <int V>
__device__ void unpack(const Raw& raw, Type type, float (&values)[V]) {
  if (is_float<V>(type)) {
#pragma unroll
    for (int k = 0; k < V; ++k) values[k] = __uint_as_float(raw.words[k % 4]);
  } else if (type == Type::bfloat16) {
#pragma unroll
    for (int k = 0; k < V; ++k)
      values[k] = __uint_as_float(k % 2 ? raw.words[k / 2] & 0xffff0000u : raw.words[k / 2] << 16);
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) values[k] = from_half(raw.words[k / 2] >> k % 2 * 16 & 0xffffu);
  }
}

// One of the numbers that a batch norm has for each channel.
__device__ inline float number_at(const Rows& numbers, int64_t channel) {
  float values[4];
  unpack<4>(load<4>(numbers.at(0, 0, channel), numbers.type, {1, 1, false}), numbers.type, values);
  return values[0];
}

__device__ inline uint32_t to_16_bits(float value, Type type) {
  return type == Type::bfloat16 ? to_bfloat16(value) : to_half(value);
}

__device__ inline void store_one(char* to, float value, Type type) {
  if (type == Type::float32) {
    *reinterpret_cast<float*>(to) = value;
  } else {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(to_16_bits(value, type));
  }
}

template <int V>
__device__ void store(char* first, Type type, Span span, const float (&values)[V]) {
  if (!(span.vector && span.count == V)) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (k < span.count)
        store_one(first + k * span.step * (is_float<V>(type) ? 4 : 2), values[k], type);
    }
    return;
  }
  uint32_t words[4] = {};
  if (is_float<V>(type)) {
#pragma unroll
    for (int k = 0; k < V; ++k) words[k % 4] = __float_as_uint(values[k]);
  } else if (type == Type::bfloat16) {
#pragma unroll
    for (int k = 0; k < V; k += 2) words[k / 2] = to_bfloat16s(values[k], values[k + 1]);
  } else {
#pragma unroll
    for (int k = 0; k < V; k += 2) words[k / 2] = to_halves(values[k], values[k + 1]);
  }
  if (V == 8 || type == Type::float32) {
    *reinterpret_cast<uint4*>(first) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    *reinterpret_cast<uint2*>(first) = make_uint2(words[0], words[1]);
  }
}

}  // namespace spade_fast
