// Finds the distinct vectors of a condition [N, L, pixels], compared bit for bit; gives up if there
// are too many for a layout.
//
// Most pixels have the same vector as their left neighbour, so each is first compared with that
// alone, channel by channel, in the one pass that reads the condition. Only pixels that differ are
// looked up by a hash and compared in full with the vector that it finds.

#include "codes.h"

#include <algorithm>

#include "distinct.h"
#include "vector.h"

namespace spade_fast {
namespace {

// Adds one channel of a block of pixels to their hashes, and marks the pixels that differ from
// their predecessor.
template <typename Bits>
struct HashChannel {
  static ALWAYS_INLINE void run(int64_t count, const Bits* channel, bool has_before,
                                uint32_t* hashes, uint8_t* differs) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t bits = channel[i];
      hashes[i] =
          (hashes[i] ^ static_cast<uint32_t>(bits ^ bits >> 32)) * 0x9e3779b1u + (hashes[i] >> 15);
    }
    if (has_before) differs[0] |= channel[0] != channel[-1];
#pragma omp simd
    for (int64_t i = 1; i < count; ++i) differs[i] |= channel[i] != channel[i - 1];
  }
};

bool too_many(int64_t codes, int64_t pixels) { return codes > kFewCodes + pixels / kPixelsPerCode; }

// Whether the first pixels of the first channel alone have too many distinct values, which
// identifies dense features at once.
template <typename Bits>
bool is_dense(const Bits* segmap, int64_t count) {
  std::vector<Bits> values(segmap, segmap + count);
  std::sort(values.begin(), values.end());
  return too_many(std::unique(values.begin(), values.end()) - values.begin(), count);
}

template <typename Bits>
bool find(const Bits* segmap, int64_t batch, int64_t channels, int64_t pixels, int32_t* codes,
          std::vector<int64_t>* places) {
  constexpr int64_t kBlockPixels = 256;
  if (batch * channels > 0 && is_dense(segmap, std::min(kBlockPixels, pixels))) return false;
  Distinct<Bits> vectors(channels);
  std::vector<Bits> vector(channels);
  for (int64_t n = 0; n < batch; ++n) {
    const Bits* image = segmap + n * channels * pixels;
    for (int64_t start = 0; start < pixels; start += kBlockPixels) {
      const int64_t count = std::min(kBlockPixels, pixels - start);
      uint32_t block_hashes[kBlockPixels] = {};
      uint8_t differs[kBlockPixels] = {};
      for (int64_t c = 0; c < channels; ++c) {
        vectorised<HashChannel<Bits>>(count, image + c * pixels + start, start > 0, block_hashes,
                                      differs);
      }
      for (int64_t i = 0; i < count; ++i) {
        int32_t& code = codes[n * pixels + start + i];
        if (!differs[i] && start + i > 0) {
          code = (&code)[-1];
          continue;
        }
        for (int64_t c = 0; c < channels; ++c) vector[c] = image[c * pixels + start + i];
        const auto [number, is_new] = vectors.number(vector.data(), block_hashes[i]);
        if (is_new) places->push_back(n * pixels + start + i);
        code = number;
        if (too_many(vectors.count(), n * pixels + start + i)) return false;
      }
    }
  }
  return true;
}

}  // namespace

bool find_codes(const void* segmap, int64_t element_size, int64_t batch, int64_t channels,
                int64_t pixels, int32_t* codes, std::vector<int64_t>* places) {
  if (element_size == 8)
    return find(static_cast<const uint64_t*>(segmap), batch, channels, pixels, codes, places);
  if (element_size == 4)
    return find(static_cast<const uint32_t*>(segmap), batch, channels, pixels, codes, places);
  return find(static_cast<const uint16_t*>(segmap), batch, channels, pixels, codes, places);
}

}  // namespace spade_fast
