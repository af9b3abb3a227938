// Numbers distinct rows of values.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace spade_fast {

// The distinct rows seen so far, numbered 0, 1, … in order of first appearance: an open-addressing
// hash table. Hashes only find candidates; comparing the rows decides.
template <typename Value>
class Distinct {
 public:
  // Hashes are masked so that a test can make them collide.
  explicit Distinct(int64_t length, uint64_t hash_mask = ~uint64_t{0})
      : length_(length), hash_mask_(hash_mask), slots_(1024, kFree) {}

  // Returns the row's number and whether the row is new.
  std::pair<int32_t, bool> number(const Value* row, uint64_t hash) {
    hash &= hash_mask_;
    uint64_t slot = hash & (slots_.size() - 1);
    for (; slots_[slot] != kFree; slot = (slot + 1) & (slots_.size() - 1)) {
      const int32_t found = slots_[slot];
      if (hashes_[found] == hash && std::equal(row, row + length_, rows_.data() + found * length_))
        return {found, false};
    }
    const int32_t number = count();
    slots_[slot] = number;
    hashes_.push_back(hash);
    rows_.insert(rows_.end(), row, row + length_);
    if (hashes_.size() * 2 > slots_.size()) grow();
    return {number, true};
  }

  // A number's row and its hash.
  const Value* row(int32_t number) const { return rows_.data() + number * length_; }
  uint64_t hash(int32_t number) const { return hashes_[number]; }
  const std::vector<Value>& rows() const { return rows_; }
  int32_t count() const { return static_cast<int32_t>(hashes_.size()); }

 private:
  static constexpr int32_t kFree = -1;

  void grow() {
    slots_.assign(slots_.size() * 4, kFree);
    for (int32_t number = 0; number < count(); ++number) {
      uint64_t slot = hashes_[number] & (slots_.size() - 1);
      while (slots_[slot] != kFree) slot = (slot + 1) & (slots_.size() - 1);
      slots_[slot] = number;
    }
  }

  int64_t length_;
  uint64_t hash_mask_;
  std::vector<int32_t> slots_;    // numbers by hash; a power of two, at most half full
  std::vector<uint64_t> hashes_;  // by number
  std::vector<Value> rows_;       // by number
};

}  // namespace spade_fast
