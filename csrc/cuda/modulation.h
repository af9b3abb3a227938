// The arithmetic on V elements: modulation and activation, and the gradient back through them.
#pragma once

#include "walk.h"

namespace spade_fast {

struct GammaBeta {
  Raw gamma, beta;
};

// The row of γ and β for these elements, if they share one.
template <bool kLast>
__device__ uint32_t modulation_row(const Cursors<kLast>& in, const Elements& elements) {
  return kLast && in.o.index != nullptr && elements.span.count > 0
             ? row_at(in.o, in.index + elements.item)
             : elements.item;
}

// Loads γ and, if wanted, β for these elements: dense ones from the elements' own places, else from
// the row of the table that each pixel has.
template <int V, bool kLast>
__device__ GammaBeta load_modulation(const Cursors<kLast>& in, const Elements& elements,
                                     uint32_t row, bool wants_beta) {
  const Operands& o = in.o;
  const Span span = elements.span;
  GammaBeta found = {};
  if (kLast || o.index == nullptr) {
    found.gamma = load<V>(in.gamma.at(row), o.gamma.type, span);
    if (wants_beta) found.beta = load<V>(in.beta.at(row), o.beta.type, span);
    return found;
  }
  const int32_t* first = in.index + elements.start;
  uint32_t rows[V] = {};
  if (span.vector && span.count == V && reinterpret_cast<uintptr_t>(first) % 16 == 0) {
#pragma unroll
    for (int k = 0; k < V; k += 4) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(first + k));
      rows[k] = four.x, rows[k + 1] = four.y, rows[k + 2] = four.z, rows[k + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (k < span.count) rows[k] = static_cast<uint32_t>(__ldg(first + k * span.step));
    }
  }
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (k >= span.count) continue;
    set<V>(&found.gamma, k, o.gamma.type, in.gamma.at(row_of(o, rows[k])));
    if (wants_beta) set<V>(&found.beta, k, o.beta.type, in.beta.at(row_of(o, rows[k])));
  }
  return found;
}

template <bool kLast>
__device__ uint8_t* signs_at(const Cursors<kLast>& in, const Elements& elements) {
  return in.signs +
         (kLast ? static_cast<uint64_t>(elements.item) * in.signs_step : elements.start / 8);
}

// Stores the signs of these elements. All lanes of a warp must call this together, even those
// without elements.
template <int V, bool kLast>
__device__ void store_signs(const Cursors<kLast>& in, const Elements& elements,
                            const float (&y)[V]) {
  const Operands& o = in.o;
  // PyTorch's ReLU passes the gradient through at NaN.
  const bool keeps_nan = o.activation == Activation::relu;
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (k < elements.span.count && (keeps_nan ? !(y[k] <= 0) : y[k] > 0)) bits |= 1u << k;
  }
  if (elements.span.step == 1) {
    // The neighbouring lane has the other half of the byte.
    if (V == 4) bits |= __shfl_xor_sync(~0u, bits, 1) << 4;
    if (elements.span.count > 0 && elements.start % 8 == 0)
      *signs_at(in, elements) = static_cast<uint8_t>(bits);
    return;
  }
  const int lane = threadIdx.x;
  uint32_t byte = 0;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const uint32_t word = __ballot_sync(~0u, bits >> k & 1);
    if (lane / 4 == k) byte = word >> lane % 4 * 8;
  }
  const uint32_t at = (elements.start - lane) / 8 + lane;
  if (lane < 4 * V && at < in.signs_step) in.signs[at] = static_cast<uint8_t>(byte);
}

template <int V, bool kLast>
__device__ uint32_t load_signs(const Cursors<kLast>& in, const Elements& elements) {
  const Operands& o = in.o;
  if ((o.activation != Activation::relu && o.activation != Activation::leaky_relu) ||
      elements.span.count == 0)
    return 0;
  const uint8_t* byte = signs_at(in, elements);
  const int shift = elements.start % 8;
  if (elements.span.step == 1) return __ldg(byte) >> shift;
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (k < elements.span.count) bits |= (__ldg(byte + 4 * k) >> shift & 1u) << k;
  }
  return bits;
}

// Stores y = act(x̂·(addend + γ) + β), given x̂, and its signs.
template <int V, bool kLast>
__device__ void modulate(const Cursors<kLast>& in, const Elements& elements, float (&values)[V],
                         const GammaBeta& modulation, const Cursor& y) {
  const Operands& o = in.o;
  float gamma[V], beta[V];
  unpack<V>(modulation.gamma, o.gamma.type, gamma);
  unpack<V>(modulation.beta, o.beta.type, beta);
#pragma unroll
  for (int k = 0; k < V; ++k) values[k] = values[k] * (o.addend + gamma[k]) + beta[k];
  if (o.signs != nullptr) store_signs<V>(in, elements, values);
  if (o.activation == Activation::relu) {
#pragma unroll
    for (int k = 0; k < V; ++k) values[k] = values[k] <= 0 ? 0.0f : values[k];  // NaN stays NaN
  } else if (o.activation == Activation::leaky_relu) {
#pragma unroll
    for (int k = 0; k < V; ++k)
      values[k] = values[k] > 0 ? values[k] : values[k] * o.negative_slope;
  } else if (o.activation == Activation::silu) {
#pragma unroll
    for (int k = 0; k < V; ++k) values[k] = values[k] / (1 + expf(-values[k]));
  }
  store<V>(y, elements, values);
}

template <int V>
struct Gradient {
  float deviation[V], g[V], factor[V];  // x − shift, dy·act'(…), addend + γ
};

template <int V, bool kSilu, typename Number>
__device__ Gradient<V> gradient(const Operands& o, const Raw& x, const Raw& dy,
                                const GammaBeta& modulation, uint32_t signs, const Number& shift,
                                const Number& scale, const Number& offset) {
  Gradient<V> found;
  unpack<V>(x, o.x.type, found.deviation);
  unpack<V>(dy, o.dy.type, found.g);
  unpack<V>(modulation.gamma, o.gamma.type, found.factor);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    found.deviation[k] -= shift[k];
    found.factor[k] += o.addend;
  }
  if (!kSilu && o.activation != Activation::none) {
    const float slope = o.negative_slope;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (!(signs >> k & 1))
        found.g[k] = o.activation == Activation::relu ? 0.0f : found.g[k] * slope;
    }
  } else if (kSilu) {
    float beta[V];
    unpack<V>(modulation.beta, o.beta.type, beta);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float y = (found.deviation[k] * scale[k] + offset[k]) * found.factor[k] + beta[k];
      const float sigmoid = 1 / (1 + expf(-y));
      found.g[k] *= sigmoid * (1 + y * (1 - sigmoid));
    }
  }
  return found;
}

// Stores dγ = g·x̂, and dβ = g unless it is dy itself; adds q = g·(addend + γ) and q·(x − shift) to
// the sums.
template <int V, typename Number>
__device__ void store_gradient(const Elements& elements, const Gradient<V>& found,
                               const Number& scale, const Number& offset, const Cursor& dgamma,
                               const Cursor& dbeta, float (&q_sum)[V],
                               float (&q_deviation_sum)[V]) {
  if (dbeta.first != nullptr) store<V>(dbeta, elements, found.g);
  float product[V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    product[k] = found.g[k] * (found.deviation[k] * scale[k] + offset[k]);
    const float q = k < elements.span.count ? found.g[k] * found.factor[k] : 0.0f;
    q_sum[k] += q;
    q_deviation_sum[k] += k < elements.span.count ? q * found.deviation[k] : 0.0f;
  }
  store<V>(dgamma, elements, product);
}

}  // namespace spade_fast
