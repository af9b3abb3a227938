// Finding the codes of a condition (codes.cpp), for module.cpp to give to Python.
#pragma once

#include <cstdint>
#include <vector>

namespace spade_fast {

// A condition with more distinct vectors than this is no layout: as soon as that is clear, no more
// pixels are looked at. `numbering.py` has the same rule.
constexpr int64_t kFewCodes = 64, kPixelsPerCode = 4;

// The code of each pixel of a contiguous condition [batch, channels, pixels], into codes [batch,
// pixels], and the first place of each code. False where it has too many.
bool find_codes(const void* segmap, int64_t element_size, int64_t batch, int64_t channels,
                int64_t pixels, int32_t* codes, std::vector<int64_t>* places);

}  // namespace spade_fast
