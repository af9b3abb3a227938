// Finds the distinct vectors of a condition [N, L, pixels], compared bit for bit; gives up if there
// are too many for a layout.
//
// Most pixels have the same vector as their left neighbour, so each is first compared with that
// alone, channel by channel, in the one pass that reads the condition. Only pixels that differ are
// looked up by a hash and compared in full with the vector that it finds. Threads do so for blocks
// of pixels, each by itself. The vectors of the blocks are then numbered in the order of the
// blocks, so that codes follow first appearance whatever the number of threads.

#include "codes.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "../common/codes.h"
#include "distinct.h"
#include "runs.h"
#include "vector.h"

namespace spade_fast {
namespace {

// The processor does not foresee a block's part of the next channel, a whole plane away, so each is
// requested this many channels ahead.
constexpr int64_t kBlockPixels = 512, kChannelsAhead = 4;
// Each group of blocks is as long as all before it together, within these bounds: a condition is
// given up between groups.
constexpr int64_t kFewBlocks = 4, kManyBlocks = 64;
constexpr int64_t kDenseSample = 256;         // pixels
constexpr int64_t kThreadElements = 1 << 19;  // fewer are not worth waking a thread

// Adds one channel of a block of pixels to their hashes, and marks the pixels that differ from
// their predecessor.
template <typename Bits>
struct HashChannel {
  static ALWAYS_INLINE void run(int64_t count, const Bits* channel, const Bits* ahead,
                                uint32_t* hashes, uint8_t* differs) {
    constexpr int64_t kLine = 64 / sizeof(Bits);
    for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(ahead + i);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t bits = channel[i];
      hashes[i] =
          (hashes[i] ^ static_cast<uint32_t>(bits ^ bits >> 32)) * 0x9e3779b1u + (hashes[i] >> 15);
    }
    MarkChanges<Bits>::run(count, channel, differs);
  }
};

// Whether the first pixels of the first channel alone have too many distinct values, which
// identifies dense features at once.
template <typename Bits>
bool is_dense(const Bits* segmap, int64_t count) {
  std::vector<Bits> values(segmap, segmap + count);
  std::sort(values.begin(), values.end());
  return are_many(std::unique(values.begin(), values.end()) - values.begin(), count);
}

// The distinct vectors of a block of one image's pixels.
template <typename Bits>
struct Block {
  Distinct<Bits> vectors;
  std::vector<int64_t> firsts;   // the first pixel of each vector
  std::vector<int64_t> starts;   // of the runs of equal pixels, and the end of the last
  std::vector<int32_t> numbers;  // the vector of each run

  Block(const Bits* pixel, int64_t count, int64_t channels, int64_t plane) : vectors(channels) {
    uint32_t hashes[kBlockPixels] = {};
    uint8_t differs[kBlockPixels] = {};
    for (int64_t c = 0; c < channels; ++c) {
      const Bits* ahead = pixel + std::min(c + kChannelsAhead, channels - 1) * plane;
      vectorised<HashChannel<Bits>>(count, pixel + c * plane, ahead, hashes, differs);
    }
    for_each_run(differs, count, [&](int64_t start, int64_t) { starts.push_back(start); });
    const int64_t runs = starts.size();
    std::vector<Bits> rows(runs * channels);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t run = 0; run < runs; ++run)
        rows[run * channels + c] = pixel[c * plane + starts[run]];
    }
    for (int64_t run = 0; run < runs; ++run) {
      const auto [number, is_new] =
          vectors.number(rows.data() + run * channels, hashes[starts[run]]);
      if (is_new) firsts.push_back(starts[run]);
      numbers.push_back(number);
    }
    starts.push_back(count);
  }
};

template <typename Bits>
bool find(const Bits* segmap, int64_t batch, int64_t channels, int64_t pixels, int32_t* codes,
          std::vector<int64_t>* places) {
  if (batch * channels > 0 && is_dense(segmap, std::min(kDenseSample, pixels))) return false;
  const int64_t per_image = (pixels + kBlockPixels - 1) / kBlockPixels, blocks = batch * per_image,
                elements = std::min(kBlockPixels, pixels) * channels,
                grain = std::max<int64_t>(1, kThreadElements / std::max<int64_t>(1, elements));
  Distinct<Bits> vectors(channels);
  for (int64_t first = 0, last; first < blocks; first = last) {
    last = std::min(first + std::clamp(first, kFewBlocks, kManyBlocks), blocks);
    std::optional<Block<Bits>> group[kManyBlocks];
    torch::stable::parallel_for(first, last, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t n = b / per_image, start = b % per_image * kBlockPixels;
        group[b - first].emplace(segmap + n * channels * pixels + start,
                                 std::min(kBlockPixels, pixels - start), channels, pixels);
      }
    });
    for (int64_t b = first; b < last; ++b) {
      const Block<Bits>& block = *group[b - first];
      const int64_t place = b / per_image * pixels + b % per_image * kBlockPixels;
      std::vector<int32_t> code_of(block.vectors.count());
      for (int32_t number = 0; number < block.vectors.count(); ++number) {
        const auto [code, is_new] =
            vectors.number(block.vectors.row(number), block.vectors.hash(number));
        code_of[number] = code;
        if (!is_new) continue;
        places->push_back(place + block.firsts[number]);
        if (are_many(vectors.count(), places->back())) return false;
      }
      for (size_t run = 0; run < block.numbers.size(); ++run) {
        std::fill(codes + place + block.starts[run], codes + place + block.starts[run + 1],
                  code_of[block.numbers[run]]);
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
