// The convolution at windows: the arguments that convolution.cpp passes to its kernels.
#pragma once

#include "lists.h"

namespace spade_fast {

// A weight [out, in, *kernel], whose taps lie a constant step apart, and its bias or null.
struct Unpacked {
  const uint16_t *weight, *bias;
  int64_t output, channel, tap, bias_step;  // in elements
};

constexpr int kMostUnpacked = 4;

// Packs weights and biases, one after the other, into [outputs of all, taps + 1, width]. The
// channels of a tap are contiguous and padded with zeros to a multiple of eight. The bias, or zero,
// is the first channel of an additional last tap.
struct Packing {
  Unpacked parts[kMostUnpacked];
  int64_t ends[kMostUnpacked];  // the number of outputs up to the end of each part
  int count, channels, taps, width;
  uint16_t* packed;
};

void pack_convolution(Stream stream, const Packing& p);

struct WindowConvolution {
  Lists lists;  // of entries row · taps + tap: what each window sees
  Rows rows, results;
  int64_t row_count;
  bool vector;                // whether rows are aligned to 16 bytes and consist of whole vectors
  const char *weight, *bias;  // 16-bit elements; bias may be null
  // Steps, in elements; the channels of a tap are contiguous.
  int64_t output, tap, bias_step;
  // `width` is the number of the weight's channels, padded with zeros to a multiple of eight.
  int outputs, channels, taps, width;
  bool relu;  // whether negative results become zero
};

void convolve_windows(Stream stream, const WindowConvolution& w);

}  // namespace spade_fast
