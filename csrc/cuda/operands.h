// The kernels' arguments.
#pragma once

#include "../common/activation.h"
#include "device.h"

namespace spade_fast {

enum class Type : int32_t { float32, bfloat16, float16 };

// A thread's position in a tensor: item i is `step` bytes behind item i − 1, so an address takes
// one multiplication.
struct Cursor {
  char* first;
  uint32_t step;  // bytes
  Type type;

  __device__ char* at(uint32_t item) const { return first + static_cast<uint64_t>(item) * step; }
};

// A tensor: the distance between images, and between the rows of an image, in elements. Tables have
// no images.
struct Rows {
  char* data;
  int64_t image, row;
  Type type;

  __device__ char* at(int64_t of_image, int64_t of_row, int64_t element) const {
    return data + (of_image * image + of_row * row + element) * size();
  }
  __device__ Cursor rows_from(int64_t of_image, int64_t element) const {
    return {at(of_image, 0, element), static_cast<uint32_t>(row) * size(), type};
  }
  __device__ Cursor elements_from(int64_t of_image, int64_t of_row) const {
    return {at(of_image, of_row, 0), size(), type};
  }
  __device__ uint32_t size() const { return type == Type::float32 ? 4 : 2; }
};

struct Shape {
  int64_t images, channels, pixels;
};

// The operands of apply and of the backward kernels, unset where a kernel does not need them;
// contract.py defines each.
struct Operands {
  Shape shape;
  Rows x, gamma, beta, dy;
  const int32_t* index;  // null where γ and β are dense
  uint32_t rows;         // of the table
  const float* planes;
  uint8_t* signs;
  Activation activation;
  float negative_slope, addend;  // the factor of x̂ is addend + γ: 1 + γ, or γ itself
  bool vector;                   // whether the rows of all tensors are aligned to 16 bytes
};

}  // namespace spade_fast
