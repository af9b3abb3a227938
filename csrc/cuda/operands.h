// What the kernels are given.
#pragma once

#include "../common/activation.h"
#include "device.h"

namespace spade_fast {

enum class Type : int32_t { float32, bfloat16, float16 };

// A tensor: its images and the rows of each so many elements apart. The rows of a table belong to no image.
struct Rows {
  char* data;
  int64_t image, row;
  Type type;

  __device__ char* at(int64_t of_image, int64_t of_row, int64_t element) const {
    return data + (of_image * image + of_row * row + element) * (type == Type::float32 ? 4 : 2);
  }
};

struct Shape {
  int64_t images, channels, pixels;
};

// What apply and the backward kernels read, those of it that they need: `contract.py` says what each is.
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
