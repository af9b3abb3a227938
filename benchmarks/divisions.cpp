// Prints how csrc/cuda/plan.h divides the work on planes of 16-bit numbers. Each line of the input
// has images, channels, pixels, whether x is channels-last, and a GPU's processors and most shared
// memory per block. Each line of the output has, for the kernels of one pass, forward and backward,
// then for `sweep` and `tiles`: blocks, columns, lanes, items of a block, bytes that it holds. It
// has zeros where a unit is not held.

#include <iostream>

#include "plan.h"

namespace {

void print(const std::optional<spade_fast::Division>& found) {
  const auto d = found.value_or(spade_fast::Division{});
  std::cout << d.blocks() << ' ' << d.columns << ' ' << d.lanes << ' ' << d.split_items << ' '
            << d.held_bytes << ' ';
}

}  // namespace

int main() {
  spade_fast::Shape shape;
  bool last;
  int64_t processors, most_shared;
  while (std::cin >> shape.images >> shape.channels >> shape.pixels >> last >> processors >>
         most_shared) {
    const int vector = (last ? shape.channels : shape.pixels) % 8 == 0 ? 8 : 4;
    for (const int64_t held : {1, 2})
      print(spade_fast::one_pass(shape, vector, last, held, most_shared, spade_fast::kCluster,
                                 processors));
    print(spade_fast::sweep(shape, vector, last, processors));
    print(spade_fast::tiles(shape, vector, last, false, processors));
    std::cout << '\n';
  }
}
