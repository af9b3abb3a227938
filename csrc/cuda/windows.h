// The convolution at windows, as convolution.cpp calls it.
#pragma once

#include "lists.h"

namespace spade_fast {

// A weight [out, in, *kernel] whose taps lie a step apart, and its bias, to be packed: [out, taps +
// 1, width] with the channels of a tap side by side, zeros to a multiple of eight, and the bias, or
// zero, in the place of a last tap's first channel.
struct Packing {
  const uint16_t *weight, *bias;
  int64_t output, channel, tap;  // steps
  int64_t outputs, bias_step;
  int channels, taps, width;
  uint16_t* packed;
};

void pack_convolution(Stream stream, const Packing& p);

struct WindowConvolution {
  Lists lists;  // of row · taps + tap: what each window sees
  Rows rows, results;
  int64_t row_count;
  bool vector;  // whether rows begin at addresses divisible by 16, and have whole vectors
  const char *weight, *bias;  // of two bytes a number; no bias is null
  // Steps from one to the next; the channels of a tap lie side by side.
  int64_t output, tap, bias_step;
  // Width: the weight's channels, a multiple of eight; the last may be zeros.
  int outputs, channels, taps, width;
};

void convolve_windows(Stream stream, const WindowConvolution& w);

}  // namespace spade_fast
