// The rule by which a condition is a layout, for every device.
#pragma once

#include <cstdint>

namespace spade_fast {

// Whether a condition of this number of pixels has too many distinct vectors to be a layout.
// numbering.py has the same rule.
inline bool are_many(int64_t codes, int64_t pixels) { return codes > 64 + pixels / 4; }

}  // namespace spade_fast
