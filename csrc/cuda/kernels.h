// The launchers of the kernels; each kernel is in the file of its name.
#pragma once

#include <type_traits>

#include "plan.h"

namespace spade_fast {

// How to launch: the number V of elements per vector, whether channels are last, and whether every
// vector has either all V elements or none (`whole`), as is always so if V is 8.
struct Settings {
  Stream stream;
  int vector;
  bool last, whole;
};

// The settings of a kernel whose vectors are of channels, whatever the layout.
inline Settings over_channels(Settings settings, int64_t channels) {
  if (channels % 8 != 0) settings.vector = 4;
  settings.whole = settings.whole && channels % settings.vector == 0;
  return settings;
}

// Calls f with all three as compile-time constants.
template <typename F>
void specialised(const Settings& settings, F&& f) {
  const auto with_last = [&](auto vector, auto whole) {
    settings.last ? f(vector, std::true_type(), whole) : f(vector, std::false_type(), whole);
  };
  if (!settings.whole) return with_last(std::integral_constant<int, 4>(), std::false_type());
  settings.vector == 8 ? with_last(std::integral_constant<int, 8>(), std::true_type())
                       : with_last(std::integral_constant<int, 4>(), std::true_type());
}

// The same, and whether the activation is SiLU, whose derivative needs its argument rather than a
// bit.
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

// Launches a kernel that combines the results of all splits, 32 planes per block.
template <typename Found, typename... Parameters, typename... Arguments>
void launch_combination(void (*kernel)(Parameters...), const Settings& settings, const Operands& o,
                        Arguments... arguments) {
  launch(kernel, divide_up(o.shape.images * o.shape.channels, 32), dim3(32, kCombiners / 32),
         32 * 33 * sizeof(Found), settings.stream, o, arguments...);
}

constexpr int64_t kMomentParts = 3;  // numbers per plane in the parts of moments
constexpr int64_t kSumParts = 2;     // and in the parts of sums

// Writes parts [splits, 3, N, C] of the planes' moments.
void plane_moments(const Settings& settings, const Operands& o, const Division& d, float* parts);
// Combines those to moments [2, N, C], or if `moments` is null to the planes [3, N, C] of instance
// norm.
void combine_moments(const Settings& settings, const Operands& o, const Division& d,
                     const float* parts, float eps, float* moments, float* planes);
// Numbers [C] of a batch norm's channels; without a weight or bias of its own their data is null.
struct RunningStatistics {
  Rows mean, variance, weight, bias;
  float eps;
  int64_t images, channels;
  float* planes;  // [3, N, C]
};
void running_planes(Stream stream, const RunningStatistics& s);
// A batch norm in train mode; without a weight or bias of its own their data is null.
struct BatchNorm {
  const float* found;  // moments or sums: [2, N, C]
  Rows weight, bias;
  const float* inverse_deviation;  // [C], for batch_terms
  float eps, pixels;               // pixels of a plane
  int64_t images, channels;
  float* results;     // planes [3, N, C] or terms [2, N, C]
  float* statistics;  // [3, C]: mean, inverse deviation, unbiased variance; for batch_planes
};
void batch_planes(Stream stream, const BatchNorm& b);
void batch_terms(Stream stream, const BatchNorm& b);
void apply(const Settings& settings, const Operands& o, const Division& d, const Rows& y);
// Writes dγ, dβ, and parts [splits, 2, N, C] of the planes' sums.
void backward_sums(const Settings& settings, const Operands& o, const Division& d,
                   const Rows& dgamma, const Rows& dbeta, float* parts);
// Combines those to sums [2, N, C], or if `sums` is null to the terms [2, N, C] of instance norm.
void combine_sums(const Settings& settings, const Operands& o, int64_t splits, const float* parts,
                  float* sums, float* terms);
// `terms` may be null.
void backward_input(const Settings& settings, const Operands& o, const Division& d,
                    const float* terms, const Rows& dx);
// The largest cluster that the kernels of instance norm can use.
int64_t most_blocks();
void instance_forward(const Settings& settings, const Operands& o, const Division& d, float eps,
                      const Rows& y, float* planes);
void instance_backward(const Settings& settings, const Operands& o, const Division& d,
                       const Rows& dgamma, const Rows& dbeta, const Rows& dx);

// The pieces into which the sorted pixels of all images are cut, at most `most`. Everything here is
// computed on the device.
struct Pieces {
  const int32_t* order;
  int64_t rows, most, kept;
  int32_t* counts;  // [blocks of places]: pieces that begin in each; after the scan, before each
  int32_t* firsts;  // [most + 1]: the place of each piece's first pixel, and the end of the last
  int32_t* piece_rows;    // [most]: the row of each piece
  int32_t* image_firsts;  // [N + 1], zeroed: the first piece of each image, and the end
  int32_t* ranges;      // [rows, N, 2], zeroed: each row's first piece, and the one after its last
  int32_t* row_pieces;  // [rows], zeroed: the number of pieces of each row
  int32_t* taken;       // [1], zeroed: the number of slots in `found` that are taken
  int32_t* places;      // [most]: the slot of each piece there, or kNotKept
  float* found;         // [kept, 2, C]: Σg and Σg·(x − shift) of pieces that share their row
};

constexpr int64_t kPlaces = 1024;  // per block that looks for pieces
constexpr int64_t kPiece = 32;     // pixels
constexpr int32_t kNotKept = -1;

// Writes dγ and dβ [rows, C] of a table, and parts [splits, 2, N, C] of the planes' sums. The
// settings are `over_channels`.
void table_sums(const Settings& settings, const Operands& o, const Pieces& pieces, int64_t splits,
                const Rows& dgamma, const Rows& dbeta, float* parts);

}  // namespace spade_fast
