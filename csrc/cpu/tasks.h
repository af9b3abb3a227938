// Divides the work on x [N, C, *spatial] into tasks, and a task into blocks.
#pragma once

#include "tensors.h"

namespace spade_fast {

// A task has about 32768 elements at most, whatever the number of threads, so that sums do not
// depend on that number. It is a part of a unit, adjacent planes of one image: one plane or, where
// a table is looked up in tiles, several; with channels last all, and the task is a band of an
// image's pixels, few enough for one float32 sum.
struct Tasks {
  static constexpr int64_t kTask = 32768, kBand = 256, kPlanes = 16;

  Layout layout;
  int64_t batch, channels, pixels;
  int64_t width;  // planes per unit; the last unit of an image may have fewer
  int64_t step;   // pixels per task
  int64_t parts;  // tasks per unit: task t belongs to unit t / parts

  Tasks(const Tensor& x, Layout layout, bool looks_up = false)
      : layout(layout), batch(x.size(0)), channels(x.size(1)), pixels(1) {
    for (int64_t dim = 2; dim < x.dim(); ++dim) pixels *= x.size(dim);
    if (layout == Layout::contiguous) {
      width = looks_up ? kPlanes : 1;
      step = kTask / width;
    } else {
      width = std::max<int64_t>(1, channels);
      step = std::clamp<int64_t>(kTask / width, 1, kBand);
    }
    parts = std::max<int64_t>(1, (pixels + step - 1) / step);
  }

  int64_t planes() const { return batch * channels; }
  int64_t units_per_image() const { return (channels + width - 1) / width; }
  int64_t units() const { return batch * units_per_image(); }
  int64_t count() const { return units() * parts; }
  int64_t rows() const { return layout == Layout::contiguous ? channels : pixels; }
  int64_t length() const { return layout == Layout::contiguous ? pixels : channels; }

  // A unit's image, its first channel, the position of that plane in an array [N, C], and its
  // number of planes.
  int64_t image(int64_t unit) const { return unit / units_per_image(); }
  int64_t channel(int64_t unit) const { return unit % units_per_image() * width; }
  int64_t first_plane(int64_t unit) const { return image(unit) * channels + channel(unit); }
  int64_t planes_of(int64_t unit) const { return std::min(width, channels - channel(unit)); }

  // The pixels of a task.
  int64_t first_pixel(int64_t task) const { return task % parts * step; }
  int64_t last_pixel(int64_t task) const { return std::min(first_pixel(task) + step, pixels); }

  // Runs f(task) in parallel for every task, or for tasks `first` to `last` − 1.
  template <typename F>
  void for_each(const F& f) const {
    for_each(0, count(), f);
  }

  template <typename F>
  void for_each(int64_t first, int64_t last, const F& f) const {
    in_parallel(first, last, std::min(step, pixels) * width, f);
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
    in_parallel(0, units(), pixels * width, [&](int64_t unit) {
      for (int64_t task = unit * parts; task < (unit + 1) * parts; ++task) first(task);
      between(unit);
      for (int64_t task = (unit + 1) * parts; task-- > unit * parts;) second(task);
    });
  }

  // Calls f(first, last) for the pixels of each of a task's tiles.
  template <typename F>
  void for_each_tile(int64_t task, const F& f) const {
    const int64_t last = last_pixel(task);
    for (int64_t first = first_pixel(task); first < last; first += kTile)
      f(first, std::min(first + kTile, last));
  }

  // Calls f(n, row, start, count, number) for every block of a task. `number` is the position in an
  // array [N, C] of the block's one plane (contiguous), or of the first of its adjacent planes, one
  // for each element (channels last).
  template <typename F>
  void for_each_block(int64_t task, const F& f) const {
    const int64_t unit = task / parts, n = image(unit), number = first_plane(unit),
                  last = last_pixel(task);
    if (layout == Layout::contiguous) {
      for_each_tile(task, [&](int64_t first, int64_t end) {
        for (int64_t i = 0; i < planes_of(unit); ++i) {
          for (int64_t start = first; start < end; start += kBlock)
            f(n, channel(unit) + i, start, std::min(kBlock, end - start), number + i);
        }
      });
      return;
    }
    for (int64_t pixel = first_pixel(task); pixel < last; ++pixel) {
      for (int64_t start = 0; start < channels; start += kBlock)
        f(n, pixel, start, std::min(kBlock, channels - start), number + start);
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
