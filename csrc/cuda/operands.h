// What the kernels are given.
#pragma once

#include "../common/activation.h"
#include "device.h"

namespace spade_fast {

enum class Type : int32_t { float32, bfloat16, float16 };

// Where a thread has a tensor's elements: a few bytes from one item to the next, an address of one
// multiplication.
struct Cursor {
  char* first;
  uint32_t step;  // bytes
  Type type;

  __device__ char* at(uint32_t item) const { return first + static_cast<uint64_t>(item) * step; }
};

// A tensor: how many elements its images are apart, and the rows of each. The rows of a table
// belong to no image.
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

// What apply and the backward kernels read, those of it that they need: `contract.py` says what
// each is.
struct Operands {
  Shape shape;
  Rows x, gamma, beta, dy;
  const int32_t* index;  // null where γ and β are dense
  uint32_t rows;         // of their table
  const float* planes;
  uint8_t* signs;
  Activation activation;
  float negative_slope;
  bool vector;  // whether the rows of all tensors begin at addresses divisible by 16
};

}  // namespace spade_fast
