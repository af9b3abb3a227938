// The numbering operators on CUDA. The kernels of numbering.h run in two stages; between them the
// host waits once, to learn the sizes of the results.

#include "numbering.h"

#include "../common/checks.h"
#include "../common/codes.h"
#include "on_device.h"

namespace spade_fast {
namespace {

// Several arrays in one allocation, each aligned as the allocator would align it.
class Memory {
 public:
  template <typename T>
  int64_t add(int64_t count) {
    const int64_t at = size_;
    size_ += divide_up(count * sizeof(T), kAligned) * kAligned;
    return at;
  }

  void allocate(const Tensor& like) { memory_ = new_tensor(like, {size_}, ScalarType::Byte); }

  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_->data_ptr()) + offset);
  }

 private:
  static constexpr int64_t kAligned = 256;
  int64_t size_ = 0;
  std::optional<Tensor> memory_;
};

// The arrays of the first stage, and those that the second expects as zeros. Those that begin as
// zeros come first, so that one memset suffices.
class Work {
 public:
  Work(const Tensor& like, int64_t chunks, int64_t sections, int level_count, int64_t hash_mask,
       Stream stream) {
    const int64_t slots = power_from(2 * std::max<int64_t>(1, chunks * kThreads));
    struct {
      int64_t table, firsts, chunks, tickets, equals, words;
    } parts[kLevels];
    for (int level = 0; level < level_count; ++level) {
      parts[level].table = memory_.add<uint32_t>(slots);
      parts[level].firsts = memory_.add<uint32_t>(slots);
      parts[level].chunks = memory_.add<uint64_t>(chunks);
      parts[level].tickets = memory_.add<uint32_t>(1);
    }
    const int64_t totals = memory_.add<uint64_t>(level_count * sections + 1),
                  digits = memory_.add<uint32_t>(kMostPasses * kDigits),
                  tickets = memory_.add<uint32_t>(kMostPasses), zeroed = memory_.add<char>(0);
    for (int level = 0; level < level_count; ++level) {
      parts[level].equals = memory_.add<uint32_t>(chunks * kThreads);
      parts[level].words = memory_.add<Word>(chunks * kThreads / 32);
    }
    memory_.allocate(like);
    set_bytes(memory_.at<char>(0), 0, zeroed, stream);
    this->totals = memory_.at<uint64_t>(totals), is_wrong = this->totals + level_count * sections;
    this->digits = memory_.at<uint32_t>(digits), this->tickets = memory_.at<uint32_t>(tickets);
    for (int level = 0; level < level_count; ++level) {
      levels[level] = {memory_.at<uint32_t>(parts[level].table),
                       memory_.at<uint32_t>(parts[level].firsts),
                       static_cast<uint32_t>(slots),
                       static_cast<uint32_t>(hash_mask),
                       memory_.at<uint32_t>(parts[level].equals),
                       memory_.at<Word>(parts[level].words),
                       memory_.at<uint64_t>(parts[level].chunks),
                       this->totals + level * sections,
                       memory_.at<uint32_t>(parts[level].tickets)};
    }
  }

  Level levels[kLevels] = {};
  uint64_t *totals, *is_wrong;  // [levels, sections]; [1], behind them
  uint32_t *digits, *tickets;   // of the sort

 private:
  Memory memory_;
};

// A contiguous part of a tensor, sharing its memory.
Tensor part_of(const Tensor& whole, int64_t offset, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  AtenTensorHandle part;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(whole.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                     strides.data(), offset, &part));
  return Tensor(part);
}

// The parts of a tensor that holds several results; each is aligned as a tensor of its own would
// be.
class Layouts {
 public:
  // The results of a numbering that check_counts accepts have fewer than 2**32 numbers.
  uint32_t add(std::vector<int64_t> sizes) {
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    parts_.push_back({size_, std::move(sizes)});
    size_ += divide_up(count, 64) * 64;
    return static_cast<uint32_t>(parts_.back().first);
  }

  int64_t size() const { return size_; }

  std::vector<Tensor> of(const Tensor& whole) const {
    std::vector<Tensor> found;
    for (const auto& [offset, sizes] : parts_) found.push_back(part_of(whole, offset, sizes));
    return found;
  }

 private:
  int64_t size_ = 0;
  std::vector<std::pair<int64_t, std::vector<int64_t>>> parts_;
};

int64_t axes_of(const Tensor& codes) { return codes.dim() - 1; }

int64_t power(int64_t base, int64_t exponent) {
  int64_t found = 1;
  while (exponent-- > 0) found *= base;
  return found;
}

// The sections of all sizes, whose windows see maps of the sizes in `seen`.
Maps maps_of(const Tensor& codes, const std::vector<int64_t>& sizes,
             const std::vector<int64_t>& seen, int64_t kernel_size, int64_t stride, int64_t padding,
             int64_t rows) {
  const int64_t axes = axes_of(codes);
  Maps maps = {};
  maps.stride = static_cast<uint32_t>(stride), maps.rows = static_cast<uint32_t>(rows);
  maps.taps = static_cast<uint32_t>(power(kernel_size, axes));
  for (int axis = 0; axis < kAxes; ++axis) {
    const int64_t own = axis - (kAxes - axes);
    maps.given[axis] = own < 0 ? 1 : static_cast<uint32_t>(codes.size(1 + own));
    maps.kernel[axis] = own < 0 ? 1 : static_cast<uint32_t>(kernel_size);
    maps.padding[axis] = own < 0 ? 0 : static_cast<uint32_t>(padding);
  }
  for (size_t size = 0; size + axes <= sizes.size(); size += axes) {
    Section& section = maps.sections[maps.section_count++];
    section.first = maps.chunks * kThreads, section.pixels = 1;
    for (int axis = 0; axis < kAxes; ++axis) {
      const int64_t own = axis - (kAxes - axes);
      section.size[axis] = own < 0 ? 1 : static_cast<uint32_t>(sizes[size + own]);
      section.seen[axis] = own < 0 ? 1 : static_cast<uint32_t>(seen[size + own]);
      section.scale[axis] =
          static_cast<float>(maps.given[axis]) / static_cast<float>(section.seen[axis]);
      section.pixels *= section.size[axis];
    }
    section.count = static_cast<uint32_t>(codes.size(0)) * section.pixels;
    maps.chunks += static_cast<uint32_t>(divide_up(section.count, kThreads));
  }
  return maps;
}

// Places, entries and buckets of all sizes together must be countable in 30 bits, because
// sort_entries.cu needs the other two to mark its counts.
constexpr int64_t kCounted = int64_t{1} << 30;

void check_counts(const Tensor& codes, const std::vector<int64_t>& sizes, int64_t kernel_size,
                  int64_t rows) {
  const int64_t axes = axes_of(codes), images = codes.size(0);
  double places = 0, taps = 1;  // exact below 2**53
  for (int64_t axis = 0; axis < axes; ++axis) taps *= static_cast<double>(kernel_size);
  for (size_t size = 0; size + axes <= sizes.size(); size += axes) {
    double own = static_cast<double>(images);
    for (int64_t axis = 0; axis < axes; ++axis) own *= static_cast<double>(sizes[size + axis]);
    places += own + kThreads;
  }
  const double count = static_cast<double>(sizes.size() / axes),
               entries = places * (2 * taps + 1 + static_cast<double>(images));
  STD_TORCH_CHECK(
      entries + count * (static_cast<double>(rows) * taps + 2) < static_cast<double>(kCounted),
      "spade_fast: codes has shape ", text(codes.sizes()),
      ", which is too large for these sizes and windows of ", taps,
      " taps: together they should need fewer than 2**30 entries");
}

void check_codes(const Tensor& codes, int64_t rows) {
  check_dtype(codes, "codes", kWhole);
  STD_TORCH_CHECK(codes.dim() >= 2 && codes.dim() <= 1 + kAxes, "spade_fast: codes has shape ",
                  text(codes.sizes()),
                  "; it should be [N, *spatial] with one to three spatial dimensions");
  for (int64_t dim = 1; dim < codes.dim(); ++dim)
    STD_TORCH_CHECK(codes.size(dim) <= 1 << 24, "spade_fast: codes has shape ", text(codes.sizes()),
                    "; its spatial sizes should be at most 2**24, because float32 holds positions");
  STD_TORCH_CHECK(rows >= 0 && rows < INT32_MAX, "spade_fast: rows is ", rows,
                  "; it should be from 0 to 2**31 - 2");
}

void check_find_windows(const Tensor& codes, const std::vector<int64_t>& sizes, int64_t kernel_size,
                        int64_t rows) {
  check_codes(codes, rows);
  const int64_t axes = axes_of(codes), numbers = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(numbers % axes == 0 && numbers <= kMostSizes * axes, "spade_fast: sizes has ",
                  numbers, " numbers; it should have ", axes, " for each of at most ", kMostSizes,
                  " sizes");
  STD_TORCH_CHECK(kernel_size % 2 == 1 && kernel_size > 0 && kernel_size < 128,
                  "spade_fast: kernel_size is ", kernel_size, "; it should be odd, from 1 to 127");
  for (int64_t i = 0; i < numbers; ++i) {
    STD_TORCH_CHECK(sizes[i] >= 0 && sizes[i] < INT32_MAX, "spade_fast: sizes has ", sizes[i],
                    "; it should have numbers from 0 to 2**31 - 2");
    STD_TORCH_CHECK(sizes[i] == 0 || codes.size(1 + i % axes) > 0, "spade_fast: sizes has ",
                    sizes[i], "; it should have 0 where codes, of shape ", text(codes.sizes()),
                    ", has no pixels");
  }
  check_counts(codes, sizes, kernel_size, rows);
}

// The layout of the results in memory, and the segments to be sorted. totals: the counts that the
// host waited for, [levels, sections].
struct Plan {
  Plan(const Tensor& codes, const std::vector<int64_t>& sizes, const Maps& maps,
       const std::vector<uint64_t>& totals, int levels) {
    const int64_t axes = axes_of(codes), images = codes.size(0);
    Segment* segment = results.segments;
    uint32_t orders[kMostSizes];
    for (uint32_t number = 0; number < maps.section_count; ++number) {
      Result& result = results.of_sections[number];
      uint32_t rows = maps.rows;
      for (int level = 0; level < levels; ++level) {
        const uint64_t counts = totals[level * maps.section_count + number];
        const uint32_t windows = Counts::firsts(counts), seen = Counts::taps(counts);
        result.offsets[level] = layouts.add({windows + 1});
        result.rows[level] = layouts.add({seen});
        const uint32_t starts = layouts.add({int64_t{rows} * maps.taps + 1}),
                       sorted = layouts.add({seen});
        *segment++ = {results.entries,
                      seen,
                      buckets,
                      rows * maps.taps,
                      sorted,
                      starts,
                      result.offsets[level] + windows};
        results.entries += seen, buckets += rows * maps.taps + 1;
        rows = windows;
      }
      result.windows = rows;
      std::vector<int64_t> shape = {images};
      shape.insert(shape.end(), sizes.begin() + number * axes, sizes.begin() + (number + 1) * axes);
      result.index = layouts.add(shape);
      orders[number] = layouts.add({images, maps.sections[number].pixels});
      if (levels == 1) result.contents = layouts.add({result.windows, maps.taps});
    }
    results.lists = maps.section_count * levels, results.orders = maps.section_count;
    results.starts = buckets;
    for (uint32_t number = 0; number < maps.section_count; ++number) {
      const uint32_t count = maps.sections[number].count,
                     windows = static_cast<uint32_t>(images) * results.of_sections[number].windows;
      *segment++ = {results.entries, count, buckets, windows, orders[number], 0, 0};
      results.entries += count, buckets += windows;
    }
  }

  Layouts layouts;
  Results results = {};
  uint32_t buckets = 0;
};

// The sort of a plan's entries, in this memory.
Sorting sorting_of(const Plan& plan, const Work& work, const Tensor& like, Memory& memory) {
  Sorting sorting = {};
  sorting.count = plan.results.entries, sorting.tiles = divide_up(sorting.count, kSortTile);
  while (plan.buckets > uint64_t{1} << kDigitBits * sorting.passes) ++sorting.passes;
  const int64_t said = memory.add<uint32_t>(sorting.passes * sorting.tiles * kDigits);
  int64_t parts[4];
  for (int64_t& part : parts) part = memory.add<uint32_t>(sorting.count);
  memory.allocate(like);
  for (int side = 0; side < 2; ++side)
    sorting.sides[side] = {memory.at<uint32_t>(parts[2 * side]),
                           memory.at<uint32_t>(parts[2 * side + 1])};
  sorting.counts = work.digits, sorting.tickets = work.tickets;
  sorting.said = memory.at<uint32_t>(said);
  return sorting;
}

// Numbers the windows of codes, and with two levels the windows of those windows. Returns all
// result tensors, section by section; none if a code is out of range.
std::vector<Tensor> numbered(const Tensor& given_codes, const std::vector<int64_t>& sizes,
                             Maps maps, int levels, int64_t hash_mask) {
  const OnDevice on_device(given_codes);
  const Stream stream = on_device.stream();
  const Tensor codes = without_gaps(given_codes);
  const Work work(codes, maps.chunks, maps.section_count, levels, hash_mask, stream);
  maps.codes = codes.const_data_ptr<int32_t>(), maps.is_wrong = work.is_wrong;
  for (int level = 0; level < levels; ++level) {
    find_equal_windows(stream, maps, level == 0 ? nullptr : work.levels, work.levels[level]);
    resolve_windows(stream, maps, work.levels[level]);
  }
  std::vector<uint64_t> totals(levels * maps.section_count + 1);
  download(totals.data(), work.totals, totals.size() * sizeof(uint64_t), stream);
  if (totals.back() != 0) return {};
  Plan plan(codes, sizes, maps, totals, levels);
  const Tensor memory = new_tensor(codes, {plan.layouts.size()}, ScalarType::Int);
  plan.results.memory = memory.mutable_data_ptr<int32_t>();
  Memory sort_memory;
  const Sorting sorting = sorting_of(plan, work, codes, sort_memory);
  if (levels == 1) {
    list_patches(stream, maps, work.levels[0], plan.results, sorting);
  } else {
    list_windows(stream, maps, work.levels[0], work.levels[1], plan.results, sorting);
  }
  sort_entries(stream, sorting);
  place_sorted(stream, plan.results, sorting.sides[sorting.passes % 2]);
  return plan.layouts.of(memory);
}

// Ten tensors for each size, in the order of `find_windows` of numbering.py.
std::vector<Tensor> find_windows_of(const Tensor& codes, std::vector<int64_t> sizes,
                                    int64_t kernel_size, int64_t rows, int64_t hash_mask) {
  check_find_windows(codes, sizes, kernel_size, rows);
  if (sizes.empty()) return {};
  return numbered(codes, sizes, maps_of(codes, sizes, sizes, kernel_size, 1, kernel_size / 2, rows),
                  kLevels, hash_mask);
}

// Seven tensors: the four of `list_windows` of numbering.py, `index`, `order` and `contents`.
std::vector<Tensor> find_patches_of(const Tensor& codes, int64_t kernel_size, int64_t stride,
                                    int64_t padding, int64_t rows, int64_t hash_mask) {
  check_codes(codes, rows);
  STD_TORCH_CHECK(kernel_size > 0 && stride > 0 && padding >= 0 &&
                      std::max({kernel_size, stride, padding}) < kCounted,
                  "spade_fast: kernel_size is ", kernel_size, ", stride is ", stride,
                  ", padding is ", padding,
                  "; they should be at least 1, 1 and 0, and below 2**30");
  const std::vector<int64_t> given(codes.sizes().begin() + 1, codes.sizes().end());
  std::vector<int64_t> sizes;
  for (const int64_t length : given) {
    STD_TORCH_CHECK(length + 2 * padding >= kernel_size, "spade_fast: codes has shape ",
                    text(codes.sizes()), "; it should be no smaller than kernel_size, ",
                    kernel_size, ", after padding");
    sizes.push_back((length + 2 * padding - kernel_size) / stride + 1);
  }
  check_counts(codes, sizes, kernel_size, rows);
  return numbered(codes, sizes, maps_of(codes, sizes, given, kernel_size, stride, padding, rows), 1,
                  hash_mask);
}

// The codes [N, *spatial] of a condition and the first place of each, int64; nothing if there are
// too many codes.
std::vector<Tensor> find_codes_of(const Tensor& given_segmap, int64_t hash_mask) {
  STD_TORCH_CHECK(given_segmap.dim() >= 3 && given_segmap.dim() <= 2 + kAxes,
                  "spade_fast: segmap has shape ", text(given_segmap.sizes()),
                  "; it should be [N, label_nc, *spatial] with one to three spatial dimensions");
  check_dtype(given_segmap, "segmap", kFloating);
  std::vector<int64_t> shape = {given_segmap.size(0)};
  for (int64_t dim = 2; dim < given_segmap.dim(); ++dim) shape.push_back(given_segmap.size(dim));
  int64_t places = 1;
  for (const int64_t size : shape)
    places = product(given_segmap, "segmap", {places, size}, int64_t{1} << 30);
  product(given_segmap, "segmap", {given_segmap.size(1)}, INT32_MAX);
  const OnDevice on_device(given_segmap);
  const Stream stream = on_device.stream();
  const Tensor segmap = without_gaps(given_segmap);

  const Work work(segmap, divide_up(places, kThreads), 1, 1, hash_mask, stream);
  Vectors vectors = {};
  vectors.elements = segmap.const_data_ptr(),
  vectors.size = static_cast<int64_t>(segmap.element_size());
  vectors.channels = static_cast<uint32_t>(segmap.size(1));
  vectors.pixels = static_cast<uint32_t>(places / std::max<int64_t>(1, shape[0]));
  const uint32_t all = static_cast<uint32_t>(places);
  const Level& level = work.levels[0];
  find_equal_vectors(stream, vectors, all, level);
  resolve_vectors(stream, all, level);
  uint64_t total;
  download(&total, level.totals, sizeof(total), stream);
  const int64_t count = Counts::firsts(total);
  if (are_many(count, places)) return {};
  const Tensor codes = new_tensor(segmap, shape, ScalarType::Int);
  const Tensor first_places = new_tensor(segmap, {count}, ScalarType::Long);
  number_vectors(stream, all, level, codes.mutable_data_ptr<int32_t>(),
                 first_places.mutable_data_ptr<int64_t>());
  return {codes, first_places};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SPADE_FAST_NAMESPACE, SPADE_FAST_DISPATCH_KEY, library) {
  library.impl("find_windows", TORCH_BOX(&find_windows_of));
  library.impl("find_patches", TORCH_BOX(&find_patches_of));
  library.impl("find_codes", TORCH_BOX(&find_codes_of));
}

}  // namespace spade_fast
