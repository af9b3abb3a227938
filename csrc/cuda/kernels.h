// The kernels, as operators.cpp calls them; each is in the file of its name.
#pragma once

#include <type_traits>

#include "plan.h"

namespace spade_fast {

// How to launch: V elements of a thread at a time, channels last or not, and whether there are
// everywhere V of them or none, as there are where V is 8.
struct Settings {
  Stream stream;
  int vector;
  bool last, whole;
};

// Calls f with all three as constants.
template <typename F>
void specialised(const Settings& settings, F&& f) {
  const auto with_last = [&](auto vector, auto whole) {
    settings.last ? f(vector, std::true_type(), whole) : f(vector, std::false_type(), whole);
  };
  if (!settings.whole) return with_last(std::integral_constant<int, 4>(), std::false_type());
  settings.vector == 8 ? with_last(std::integral_constant<int, 8>(), std::true_type())
                       : with_last(std::integral_constant<int, 4>(), std::true_type());
}

// As that, and whether the activation is SiLU, whose derivative needs more numbers than a bit.
template <typename F>
void specialised(const Settings& settings, const Operands& o, F&& f) {
  specialised(settings, [&](auto vector, auto last, auto whole) {
    o.activation == Activation::silu ? f(vector, last, whole, std::true_type())
                                     : f(vector, last, whole, std::false_type());
  });
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, int64_t shared,
            Stream stream, Arguments... arguments) {
  launch_clusters(kernel, blocks, 1, threads, shared, stream, arguments...);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Settings& settings, const Division& d,
            int64_t shared, Arguments... arguments) {
  launch(kernel, d.blocks(), dim3(d.columns, d.lanes), shared, settings.stream, arguments...);
}

// A kernel that combines what splits found: 32 planes of a block.
template <typename Found, typename... Parameters, typename... Arguments>
void launch_combination(void (*kernel)(Parameters...), const Settings& settings, const Operands& o,
                        Arguments... arguments) {
  launch(kernel, divide_up(o.shape.images * o.shape.channels, 32), dim3(32, kCombiners / 32),
         32 * 33 * sizeof(Found), settings.stream, o, arguments...);
}

constexpr int64_t kMomentParts = 3;  // numbers of a plane in the parts of moments
constexpr int64_t kSumParts = 2;     // and in those of sums

// Parts [splits, 3, N, C] of the planes' moments.
void plane_moments(const Settings& settings, const Operands& o, const Division& d, float* parts);
// From those to moments [2, N, C], or where they are not wanted to instance norm's planes [3, N,
// C].
void combine_moments(const Settings& settings, const Operands& o, const Division& d,
                     const float* parts, float eps, float* moments, float* planes);
void apply(const Settings& settings, const Operands& o, const Division& d, const Rows& y);
// dγ, dβ, and parts [splits, 2, N, C] of the planes' sums.
void backward_sums(const Settings& settings, const Operands& o, const Division& d,
                   const Rows& dgamma, const Rows& dbeta, float* parts);
// From parts to sums [2, N, C], or where they are not wanted to instance norm's terms [2, N, C].
void combine_sums(const Settings& settings, const Operands& o, int64_t splits, const float* parts,
                  float* sums, float* terms);
// terms may be null.
void backward_input(const Settings& settings, const Operands& o, const Division& d,
                    const float* terms, const Rows& dx);
// Blocks of a cluster at most, in the kernels of instance norm.
int64_t most_blocks();
void instance_forward(const Settings& settings, const Operands& o, const Division& d, float eps,
                      const Rows& y, float* planes);
void instance_backward(const Settings& settings, const Operands& o, const Division& d,
                       const Rows& dgamma, const Rows& dbeta, const Rows& dx);

// The pieces that the sorted pixels of all images are cut into, `most` at most. All of it is found
// on the device.
struct Pieces {
  const int32_t* order;
  int64_t rows, most, kept;
  int32_t* counts;  // [blocks of places]: pieces that begin in each; then before each
  int32_t* firsts;  // [most + 1]: the place of a piece's first pixel, and after the last the end
  int32_t* piece_rows;    // [most]: the row of each
  int32_t* image_firsts;  // [N + 1], zeros: the first piece of each image, and the end
  int32_t* ranges;        // [rows, N, 2], zeros: each row's first piece, and the one after its last
  int32_t* row_pieces;    // [rows], zeros: how many pieces each row has
  int32_t* taken;         // [1], zero: how many places in `found` are taken
  int32_t* places;        // [most]: the place of each there, or kNotKept
  float* found;  // [kept, 2, C]: Σg and Σg·(x − shift) of pieces whose rows have others too
};

constexpr int64_t kPlaces = 1024;  // of a block that looks for pieces
constexpr int64_t kPiece = 32;     // pixels
constexpr int32_t kNotKept = -1;

// Pieces of an image that a block sums at a time.
int64_t lanes_of_pieces(const Settings& settings, const Shape& shape);
// dγ and dβ [rows, C] of a table, and parts [splits, 2, N, C] of the planes' sums.
void table_sums(const Settings& settings, const Operands& o, const Pieces& pieces, int64_t splits,
                const Rows& dgamma, const Rows& dbeta, float* parts);

}  // namespace spade_fast
