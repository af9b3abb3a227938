// Finds the codes of a condition (codes.cpp); module.cpp exports it to Python.
#pragma once

#include <cstdint>
#include <vector>

namespace spade_fast {

// Writes the code of each pixel of a contiguous condition [batch, channels, pixels] to codes
// [batch, pixels], and the first place of each code to `places`. Returns false as soon as it is
// clear that there are too many codes.
bool find_codes(const void* segmap, int64_t element_size, int64_t batch, int64_t channels,
                int64_t pixels, int32_t* codes, std::vector<int64_t>* places);

}  // namespace spade_fast
