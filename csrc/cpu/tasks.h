// Divides the work on x [N, C, *spatial] into tasks, and a task into blocks.
#pragma once

#include "tensors.h"

namespace spade_fast {

// A task has about 32768 elements at most, whatever the number of threads, so that sums do not
// depend on that number. It is a part of a plane, or with channels last a band of an image's
// pixels, few enough for one float32 sum.
struct Tasks {
  static constexpr int64_t kTask = 32768, kBand = 256;

  Layout layout;
  int64_t batch, channels, pixels;
  int64_t step;   // pixels per task
  int64_t parts;  // tasks per unit, a plane or an image: task t belongs to unit t / parts

  Tasks(const Tensor& x, Layout layout)
      : layout(layout), batch(x.size(0)), channels(x.size(1)), pixels(1) {
    for (int64_t dim = 2; dim < x.dim(); ++dim) pixels *= x.size(dim);
    step = layout == Layout::contiguous
               ? kTask
               : std::clamp<int64_t>(kTask / std::max<int64_t>(1, channels), 1, kBand);
    parts = std::max<int64_t>(1, (pixels + step - 1) / step);
  }

  int64_t planes() const { return batch * channels; }
  int64_t units() const { return layout == Layout::contiguous ? planes() : batch; }
  // Planes per unit, adjacent in memory.
  int64_t width() const { return layout == Layout::contiguous ? 1 : channels; }
  int64_t count() const { return units() * parts; }
  int64_t rows() const { return layout == Layout::contiguous ? channels : pixels; }
  int64_t length() const { return layout == Layout::contiguous ? pixels : channels; }

  // Runs f(task) in parallel for every task, or for tasks `first` to `last` − 1.
  template <typename F>
  void for_each(const F& f) const {
    for_each(0, count(), f);
  }

  template <typename F>
  void for_each(int64_t first, int64_t last, const F& f) const {
    in_parallel(first, last, std::min(step, pixels) * width(), f);
  }

  // Runs first(task) for all tasks of a unit, then between(unit), then second(task) for all its
  // tasks. If there are enough units for all threads, a thread runs both passes of a unit in
  // succession, so that the second finds its data in the cache. It runs backwards, because the end
  // of the unit is the most recently used.
  template <typename First, typename Between, typename Second>
  void in_two_passes(const First& first, const Between& between, const Second& second) const {
    const int64_t threads = torch::stable::get_num_threads();
    if (units() < 4 * threads && threads > 1) {
      for_each(first);
      for (int64_t unit = 0; unit < units(); ++unit) between(unit);
      for_each(second);
      return;
    }
    in_parallel(0, units(), pixels * width(), [&](int64_t unit) {
      for (int64_t task = unit * parts; task < (unit + 1) * parts; ++task) first(task);
      between(unit);
      for (int64_t task = (unit + 1) * parts; task-- > unit * parts;) second(task);
    });
  }

  // Calls f(n, row, start, count, number) for every block of a task. `number` is the position in an
  // array [N, C] of the block's one plane (contiguous), or of the first of its adjacent planes, one
  // for each element (channels last).
  template <typename F>
  void for_each_block(int64_t task, const F& f) const {
    const int64_t unit = task / parts, first = task % parts * step,
                  last = std::min(first + step, pixels);
    if (layout == Layout::contiguous) {
      for (int64_t start = first; start < last; start += kBlock) {
        f(unit / channels, unit % channels, start, std::min(kBlock, last - start), unit);
      }
      return;
    }
    for (int64_t pixel = first; pixel < last; ++pixel) {
      for (int64_t start = 0; start < channels; start += kBlock) {
        f(unit, pixel, start, std::min(kBlock, channels - start), unit * channels + start);
      }
    }
  }

 private:
  // `elements` is the number per i. It is not worth waking a thread for less than one task's
  // elements.
  template <typename F>
  static void in_parallel(int64_t first, int64_t last, int64_t elements, const F& f) {
    const int64_t grain = std::max<int64_t>(1, kTask / std::max<int64_t>(1, elements));
    torch::stable::parallel_for(first, last, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
      finish_stream();
    });
  }
};

}  // namespace spade_fast
