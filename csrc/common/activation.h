// The activations, and which of them need signs for backward.
#pragma once

namespace spade_fast {

enum class Activation { none, relu, leaky_relu, silu };

inline bool keeps_signs(Activation activation) {
  return activation == Activation::relu || activation == Activation::leaky_relu;
}

}  // namespace spade_fast
