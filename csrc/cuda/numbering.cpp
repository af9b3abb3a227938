// The numbering operators on CUDA. The kernels of numbering.h run in two stages; between them the
// host waits once, to learn the sizes of the results.

#include "numbering.h"

#include <cstring>

#include "../common/checks.h"
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

  void allocate(const Tensor& like) {
    memory_ = torch::stable::new_empty(like, {size_}, ScalarType::Byte);
  }

  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_->data_ptr()) + offset);
  }

 private:
  static constexpr int64_t kAligned = 256;
  int64_t size_ = 0;
  std::optional<Tensor> memory_;
};

// The offsets of a level's arrays.
struct LevelParts {
  int64_t table, firsts, equals, words, chunks;
};

// The workspace of all levels. The hash tables come first, so that one memset initialises them.
class Work {
 public:
  Work(int64_t places, int64_t chunks, int levels, int64_t hash_mask)
      : places_(places), hash_mask_(static_cast<uint32_t>(hash_mask)) {
    slots_ = power_from(2 * std::max<int64_t>(1, places));
    parts_.resize(levels);
    for (LevelParts& parts : parts_)
      parts.table = memory.add<uint32_t>(slots_), parts.firsts = memory.add<uint32_t>(slots_);
    is_wrong_ = memory.add<uint32_t>(1);
    set_ = memory.add<char>(0);
    for (LevelParts& parts : parts_) {
      parts.equals = memory.add<uint32_t>(chunks * kThreads);
      parts.words = memory.add<Word>(chunks * kThreads / 32);
      parts.chunks = memory.add<uint64_t>(chunks);
    }
  }

  void allocate(const Tensor& like, Stream stream) {
    memory.allocate(like);
    set_bytes(memory.at<char>(0), 0xff, set_, stream);
  }

  uint32_t* is_wrong() const { return memory.at<uint32_t>(is_wrong_); }

  Level level(int number) const {
    const LevelParts& parts = parts_[number];
    Level level = {};
    level.table = memory.at<uint32_t>(parts.table),
    level.firsts = memory.at<uint32_t>(parts.firsts);
    level.slots = static_cast<uint32_t>(slots_), level.hash_mask = hash_mask_;
    level.equals = memory.at<uint32_t>(parts.equals), level.words = memory.at<Word>(parts.words);
    level.chunks = memory.at<uint64_t>(parts.chunks);
    return level;
  }

  Memory memory;

 private:
  int64_t places_, slots_, is_wrong_, set_;
  uint32_t hash_mask_;
  std::vector<LevelParts> parts_;
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
  int64_t add(std::vector<int64_t> sizes) {
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    parts_.push_back({size_, std::move(sizes)});
    size_ += divide_up(count, 64) * 64;
    return parts_.back().first;
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

// The sections of all sizes, in order.
struct Sections {
  std::vector<Section> all;
  int64_t chunks = 0;

  uint32_t count() const { return static_cast<uint32_t>(all.size()); }
  int64_t bytes() const { return static_cast<int64_t>(all.size() * sizeof(Section)); }
};

Sections sections_of(const Tensor& codes, const std::vector<int64_t>& sizes) {
  const int64_t axes = axes_of(codes), images = codes.size(0);
  Sections sections;
  uint32_t nearest = 0;
  for (size_t size = 0; size + axes <= sizes.size(); size += axes) {
    Section section = {};
    section.first = static_cast<uint32_t>(sections.chunks * kThreads), section.pixels = 1;
    for (int axis = 0; axis < kAxes; ++axis) {
      const int64_t own = axis - (kAxes - axes);
      section.size[axis] = own < 0 ? 1 : static_cast<uint32_t>(sizes[size + own]);
      section.pixels *= section.size[axis];
      section.nearest[axis] = own < 0 ? 0 : nearest;
      if (own >= 0) nearest += section.size[axis];
    }
    section.count = static_cast<uint32_t>(images * section.pixels);
    section.seen_first = section.first, section.seen_pixels = section.pixels;
    std::copy_n(section.size, kAxes, section.seen_size);
    sections.chunks += divide_up(section.count, kThreads);
    sections.all.push_back(section);
  }
  return sections;
}

int64_t power(int64_t base, int64_t exponent) {
  int64_t found = 1;
  while (exponent-- > 0) found *= base;
  return found;
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
  STD_TORCH_CHECK(rows >= 0 && rows < INT32_MAX, "spade_fast: rows is ", rows,
                  "; it should be from 0 to 2**31 - 2");
}

void check_find_windows(const Tensor& codes, const Tensor& nearest,
                        const std::vector<int64_t>& sizes, int64_t kernel_size, int64_t rows) {
  check_codes(codes, rows);
  STD_TORCH_CHECK(sizes.size() % axes_of(codes) == 0, "spade_fast: sizes has ", sizes.size(),
                  " numbers; it should have a multiple of ", axes_of(codes), ", one for each axis");
  STD_TORCH_CHECK(kernel_size % 2 == 1 && kernel_size > 0 && kernel_size < 128,
                  "spade_fast: kernel_size is ", kernel_size, "; it should be odd, from 1 to 127");
  int64_t count = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0 && size < INT32_MAX, "spade_fast: sizes has ", size,
                    "; it should have numbers from 0 to 2**31 - 2");
    count += size;
  }
  check_dtype(nearest, "nearest", kWhole);
  check_shape(nearest, "nearest", std::vector<int64_t>{count},
              "a pixel for each place along each axis");
  STD_TORCH_CHECK(nearest.is_cpu() && nearest.is_contiguous(),
                  "spade_fast: nearest should be a contiguous tensor on the CPU");
  const int32_t* pixels = nearest.const_data_ptr<int32_t>();
  for (size_t i = 0; i < sizes.size(); pixels += sizes[i++]) {
    const int64_t given = codes.size(1 + i % axes_of(codes));
    for (int64_t place = 0; place < sizes[i]; ++place) {
      STD_TORCH_CHECK(pixels[place] >= 0 && pixels[place] < given, "spade_fast: nearest has ",
                      pixels[place], "; it should have pixels along that axis of codes, 0 to ",
                      given - 1);
    }
  }
  check_counts(codes, sizes, kernel_size, rows);
}

// The counts of a section, which the host waits for.
struct Found {
  uint32_t windows[kLevels], taps[kLevels];
};

// The layout of the results in memory, and the segments to be sorted.
class Plan {
 public:
  Plan(const Tensor& codes, const std::vector<int64_t>& sizes, const std::vector<Section>& sections,
       const std::vector<Found>& found, int levels, int64_t taps, int64_t rows) {
    const int64_t axes = axes_of(codes), images = codes.size(0);
    for (size_t number = 0; number < sections.size(); ++number) {
      Result result = {};
      for (int level = 0; level < levels; ++level) {
        const int64_t windows = found[number].windows[level], seen = found[number].taps[level];
        const int64_t buckets = (level == 0 ? rows : found[number].windows[0]) * taps;
        result.offsets[level] = layouts.add({windows + 1}),
        result.rows[level] = layouts.add({seen});
        const int64_t starts = layouts.add({buckets + 1}), sorted = layouts.add({seen});
        segments.push_back({entries_, static_cast<uint32_t>(seen), buckets_,
                            static_cast<uint32_t>(buckets), sorted, starts,
                            result.offsets[level] + windows});
        entries_ += segments.back().entries, buckets_ += segments.back().buckets + 1;
      }
      result.windows = found[number].windows[levels - 1];
      std::vector<int64_t> shape = {images};
      shape.insert(shape.end(), sizes.begin() + number * axes, sizes.begin() + (number + 1) * axes);
      result.index = layouts.add(shape);
      orders_.push_back(layouts.add({images, sections[number].pixels}));
      if (levels == 1) result.contents = layouts.add({result.windows, taps});
      results.push_back(result);
    }
    starts = buckets_;
    for (size_t number = 0; number < sections.size(); ++number) {
      const uint32_t buckets = static_cast<uint32_t>(images * results[number].windows);
      segments.push_back(
          {entries_, sections[number].count, buckets_, buckets, orders_[number], 0, 0});
      entries_ += sections[number].count, buckets_ += buckets;
    }
    entries = entries_, buckets = buckets_;
  }

  Layouts layouts;
  std::vector<Result> results;
  std::vector<Segment> segments;
  uint32_t entries, starts, buckets;

 private:
  std::vector<int64_t> orders_;
  uint32_t entries_ = 0, buckets_ = 0;
};

// The workspace for sorting a plan's entries, and a copy of the plan on the device.
class SortingWork {
 public:
  explicit SortingWork(const Plan& plan) : plan_(plan) {
    sorting_.count = plan.entries, sorting_.tiles = divide_up(plan.entries, kSortTile);
    while (plan.buckets > uint64_t{1} << kDigitBits * sorting_.passes) ++sorting_.passes;
    counts_ = memory_.add<uint32_t>(sorting_.passes * kDigits);
    said_ = memory_.add<uint32_t>(sorting_.passes * sorting_.tiles * kDigits);
    tickets_ = memory_.add<uint32_t>(sorting_.passes);
    zeros_ = memory_.add<char>(0);
    for (int64_t& part : entries_) part = memory_.add<uint32_t>(plan.entries);
    results_ = memory_.add<char>(result_bytes() + segment_bytes());
  }

  void allocate(const Tensor& like, Stream stream) {
    memory_.allocate(like);
    set_bytes(memory_.at<char>(0), 0, zeros_, stream);
    std::vector<char> plan(result_bytes() + segment_bytes());
    std::memcpy(plan.data(), plan_.results.data(), result_bytes());
    std::memcpy(plan.data() + result_bytes(), plan_.segments.data(), segment_bytes());
    upload(memory_.at<char>(results_), plan.data(), static_cast<int64_t>(plan.size()), stream);
    for (int side = 0; side < 2; ++side) {
      sorting_.buckets[side] = memory_.at<uint32_t>(entries_[2 * side]),
      sorting_.values[side] = memory_.at<uint32_t>(entries_[2 * side + 1]);
    }
    sorting_.counts = memory_.at<uint32_t>(counts_), sorting_.said = memory_.at<uint32_t>(said_);
    sorting_.tickets = memory_.at<uint32_t>(tickets_);
  }

  const Sorting& sorting() const { return sorting_; }

  // The results for the kernels, with the entries in one of the two buffers.
  Results results(int side, int32_t* memory) const {
    Results results = {};
    results.memory = memory;
    results.of_sections = memory_.at<Result>(results_),
    results.segments = memory_.at<Segment>(results_ + result_bytes());
    results.entries = plan_.entries, results.starts = plan_.starts;
    results.orders = static_cast<uint32_t>(plan_.results.size());
    results.lists = static_cast<uint32_t>(plan_.segments.size()) - results.orders;
    results.buckets = sorting_.buckets[side], results.values = sorting_.values[side];
    return results;
  }

 private:
  int64_t result_bytes() const {
    return static_cast<int64_t>(plan_.results.size() * sizeof(Result));
  }
  int64_t segment_bytes() const {
    return static_cast<int64_t>(plan_.segments.size() * sizeof(Segment));
  }

  const Plan& plan_;
  Memory memory_;
  Sorting sorting_ = {};
  int64_t counts_, said_, tickets_, zeros_, entries_[4], results_;
};

// What to number: the windows at the places of `sections`, which see the codes at the places of
// `taken`; with two levels also the windows of those windows.
struct Task {
  Sections taken, sections;
  std::vector<int64_t> sizes;  // of the sections
  const int32_t* nearest;      // the pixels that are taken along each axis
  int64_t nearest_count, kernel_size, stride, padding, rows;
  int levels;
};

Maps maps_of(const Tensor& codes, const Task& task) {
  Maps maps = {};
  maps.codes = codes.const_data_ptr<int32_t>();
  for (int axis = 0; axis < kAxes; ++axis) {
    const int64_t own = axis - (kAxes - axes_of(codes));
    maps.given[axis] = own < 0 ? 1 : static_cast<uint32_t>(codes.size(1 + own));
    maps.kernel[axis] = own < 0 ? 1 : static_cast<uint32_t>(task.kernel_size);
    maps.padding[axis] = own < 0 ? 0 : static_cast<uint32_t>(task.padding);
  }
  maps.stride = static_cast<uint32_t>(task.stride), maps.rows = static_cast<uint32_t>(task.rows);
  maps.taps = static_cast<uint32_t>(power(task.kernel_size, axes_of(codes)));
  return maps;
}

// The first stage: everything that runs before the host waits.
class Search {
 public:
  Search(const Tensor& codes, const Task& task, int64_t hash_mask, Stream stream)
      : task_(task),
        work_(task.sections.chunks * kThreads, task.sections.chunks, task.levels, hash_mask),
        stream_(stream) {
    const int64_t map = work_.memory.add<uint32_t>(task.taken.chunks * kThreads),
                  totals = work_.memory.add<uint64_t>(total_count());
    const int64_t taken_bytes = task.taken.bytes(), bytes = taken_bytes + task.sections.bytes();
    const int64_t plan = work_.memory.add<char>(bytes + 4 * task.nearest_count);
    work_.allocate(codes, stream);
    std::vector<char> uploaded(bytes + 4 * task.nearest_count);
    std::memcpy(uploaded.data(), task.taken.all.data(), taken_bytes);
    std::memcpy(uploaded.data() + taken_bytes, task.sections.all.data(), bytes - taken_bytes);
    if (task.nearest_count > 0)
      std::memcpy(uploaded.data() + bytes, task.nearest, 4 * task.nearest_count);
    upload(work_.memory.at<char>(plan), uploaded.data(), static_cast<int64_t>(uploaded.size()),
           stream);
    totals_ = work_.memory.at<uint64_t>(totals);
    this->map = work_.memory.at<uint32_t>(map);
    for (int level = 0; level < task.levels; ++level) levels[level] = work_.level(level);
    maps = maps_of(codes, task);
    maps.sections = work_.memory.at<Section>(plan + taken_bytes),
    maps.section_count = task.sections.count();
    maps.chunks = static_cast<uint32_t>(task.sections.chunks),
    maps.nearest = work_.memory.at<int32_t>(plan + bytes);
    maps.is_wrong = work_.is_wrong();
    Maps taken = maps;
    taken.sections = work_.memory.at<Section>(plan), taken.section_count = task.taken.count();
    taken.chunks = static_cast<uint32_t>(task.taken.chunks);
    take_codes(stream, taken, this->map);
    for (int level = 0; level < task.levels; ++level) {
      find_equal_windows(stream, maps, level == 0 ? this->map : levels[0].equals, levels[level]);
      resolve_windows(stream, maps, levels[level]);
    }
    add_up(stream, maps.sections, maps.section_count, levels, task.levels, maps.is_wrong, totals_);
  }

  // Waits for the first stage. Returns nullopt if a code is out of range.
  std::optional<std::vector<Found>> wait() const {
    std::vector<uint64_t> totals(total_count());
    download(totals.data(), totals_, total_count() * static_cast<int64_t>(sizeof(uint64_t)),
             stream_);
    if (static_cast<uint32_t>(totals.back()) != kNone) return std::nullopt;
    std::vector<Found> found(task_.sections.all.size());
    for (size_t i = 0; i + 1 < totals.size(); ++i) {
      found[i / task_.levels].windows[i % task_.levels] = Counts::firsts(totals[i]);
      found[i / task_.levels].taps[i % task_.levels] = Counts::taps(totals[i]);
    }
    return found;
  }

  Maps maps;
  uint32_t* map;
  Level levels[kLevels] = {};

 private:
  int64_t total_count() const {
    return task_.levels * static_cast<int64_t>(task_.sections.all.size()) + 1;
  }

  const Task& task_;
  Work work_;
  Stream stream_;
  uint64_t* totals_;
};

// Both stages: all result tensors, section by section; none if a code is out of range.
std::vector<Tensor> numbered(const Tensor& given_codes, const Task& task, int64_t hash_mask) {
  const OnDevice on_device(given_codes);
  const Stream stream = on_device.stream();
  const Tensor codes = without_gaps(given_codes);
  const Search search(codes, task, hash_mask, stream);
  const auto found = search.wait();
  if (!found) return {};
  const Plan plan(codes, task.sizes, task.sections.all, *found, task.levels, search.maps.taps,
                  task.rows);
  const Tensor memory = torch::stable::new_empty(codes, {plan.layouts.size()}, ScalarType::Int);
  SortingWork sorting(plan);
  sorting.allocate(codes, stream);
  int32_t* to = memory.mutable_data_ptr<int32_t>();
  if (task.levels == 1) {
    list_patches(stream, search.maps, search.map, search.levels[0], sorting.results(0, to));
  } else {
    list_windows(stream, search.maps, search.map, search.levels[0], search.levels[1],
                 sorting.results(0, to));
  }
  sort_entries(stream, sorting.sorting());
  place_sorted(stream, sorting.results(sorting.sorting().passes % 2, to));
  return plan.layouts.of(memory);
}

// Ten tensors for each size, in the order of `find_windows` of numbering.py.
std::vector<Tensor> find_windows_of(const Tensor& codes, const Tensor& nearest,
                                    std::vector<int64_t> sizes, int64_t kernel_size, int64_t rows,
                                    int64_t hash_mask) {
  check_find_windows(codes, nearest, sizes, kernel_size, rows);
  if (sizes.empty()) return {};
  const Sections sections = sections_of(codes, sizes);
  const int32_t* pixels = nearest.const_data_ptr<int32_t>();
  return numbered(codes,
                  {sections, sections, sizes, pixels, nearest.numel(), kernel_size, 1,
                   kernel_size / 2, rows, kLevels},
                  hash_mask);
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
  std::vector<int32_t> nearest;
  for (const int64_t length : given) {
    STD_TORCH_CHECK(length + 2 * padding >= kernel_size, "spade_fast: codes has shape ",
                    text(codes.sizes()), "; it should be no smaller than kernel_size, ",
                    kernel_size, ", after padding");
    sizes.push_back((length + 2 * padding - kernel_size) / stride + 1);
  }
  check_counts(codes, sizes, kernel_size, rows);
  check_counts(codes, given, 1, rows);
  for (const int64_t length : given) {
    for (int64_t pixel = 0; pixel < length; ++pixel) nearest.push_back(static_cast<int32_t>(pixel));
  }
  const Sections taken = sections_of(codes, given);
  Sections sections = sections_of(codes, sizes);
  Section& section = sections.all[0];
  section.seen_first = taken.all[0].first, section.seen_pixels = taken.all[0].pixels;
  std::copy_n(taken.all[0].size, kAxes, section.seen_size);
  return numbered(codes,
                  {taken, sections, sizes, nearest.data(), static_cast<int64_t>(nearest.size()),
                   kernel_size, stride, padding, rows, 1},
                  hash_mask);
}

// A condition with more distinct vectors than this is no layout; numbering.py has the same rule.
bool are_many(int64_t codes, int64_t places) { return codes > 64 + places / 4; }

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

  const int64_t chunks = divide_up(places, kThreads);
  Work work(places, chunks, 1, hash_mask);
  const int64_t section_part = work.memory.add<Section>(1),
                totals_part = work.memory.add<uint64_t>(2);
  work.allocate(segmap, stream);
  Section section = {};
  section.count = static_cast<uint32_t>(places);
  upload(work.memory.at<Section>(section_part), &section, sizeof(section), stream);
  Vectors vectors = {};
  vectors.elements = segmap.const_data_ptr(),
  vectors.size = static_cast<int64_t>(segmap.element_size());
  vectors.channels = static_cast<uint32_t>(segmap.size(1));
  vectors.pixels = static_cast<uint32_t>(places / std::max<int64_t>(1, shape[0]));
  const Level level = work.level(0);
  find_equal_vectors(stream, vectors, section.count, level);
  resolve_vectors(stream, section.count, level);
  uint64_t totals[2], *device_totals = work.memory.at<uint64_t>(totals_part);
  add_up(stream, work.memory.at<Section>(section_part), 1, &level, 1, work.is_wrong(),
         device_totals);
  download(totals, device_totals, sizeof(totals), stream);
  const int64_t count = Counts::firsts(totals[0]);
  if (are_many(count, places)) return {};
  const Tensor codes = torch::stable::new_empty(segmap, shape, ScalarType::Int);
  const Tensor first_places = torch::stable::new_empty(segmap, {count}, ScalarType::Long);
  number_vectors(stream, section.count, level, codes.mutable_data_ptr<int32_t>(),
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
