// dγ = g·x̂, dβ = g, and Σq and Σq·(x − shift) of each plane, with q = g·(addend + γ), for dense γ
// and β. (table_sums.cu is for tables.)
//
// A block goes through one split of a unit and sums it in registers, then over the block in shared
// memory. combine_sums_kernel adds the splits in a fixed order: no atomics.

#include "kernels.h"
#include "modulation.h"

namespace spade_fast {
namespace {

template <int V, bool kLast, bool kWhole, bool kSilu>
__global__ void __launch_bounds__(kThreads, 2)
    backward_sums_kernel(Operands o, Division d, Rows dgamma, Rows dbeta, float* parts) {
  const Part<V, kLast, kWhole> part(o, d);
  const Cursors<kLast> in(o, part.image, part.channel);
  const Cursor to_dgamma = in.in(dgamma);
  const Cursor to_dbeta = dbeta.data != nullptr ? in.in(dbeta) : Cursor{};
  const auto shift = part.numbers(o, o.planes, 0), scale = part.numbers(o, o.planes, 1),
             offset = part.numbers(o, o.planes, 2);
  float q_sum[V] = {}, q_deviation_sum[V] = {};
  for (uint32_t first = part.begin; first < part.end; first += blockDim.y) {
    const Elements elements = part.at(first + threadIdx.y);
    const Raw x = load<V>(in.x, elements), dy = load<V>(in.dy, elements);
    const GammaBeta modulation =
        load_modulation<V>(in, elements, modulation_row(in, elements), kSilu);
    const uint32_t signs = load_signs<V>(in, elements);
    const Gradient<V> found = gradient<V, kSilu>(o, x, dy, modulation, signs, shift, scale, offset);
    store_gradient<V>(elements, found, scale, offset, to_dgamma, to_dbeta, q_sum, q_deviation_sum);
  }
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const int64_t split = part.split(d);
  part.store_numbers(o, parts, 2 * split, block_sum<V, kLast>(q_sum, scratch));
  part.store_numbers(o, parts, 2 * split + 1, block_sum<V, kLast>(q_deviation_sum, scratch));
}

struct Sums {
  float q, q_deviation;
};

__device__ Sums combined(const Sums& one, const Sums& other) {
  return {one.q + other.q, one.q_deviation + other.q_deviation};
}

__device__ Sums shuffled(const Sums& mine, int lanes) {
  return {__shfl_xor_sync(~0u, mine.q, lanes), __shfl_xor_sync(~0u, mine.q_deviation, lanes)};
}

__global__ void __launch_bounds__(kCombiners)
    combine_sums_kernel(Operands o, int64_t splits, const float* parts, float* sums, float* terms) {
  const int64_t all = o.shape.images * o.shape.channels, first = blockIdx.x * 32,
                loaded = first + threadIdx.x;
  const Sums found = over_splits<Sums>(splits, [&](int64_t split) -> Sums {
    if (loaded >= all) return {};
    const float* part = parts + kSumParts * split * all + loaded;
    return {__ldg(part), __ldg(part + all)};
  });
  const int64_t plane = first + threadIdx.y;
  if (threadIdx.x != 0 || plane >= all) return;
  if (sums != nullptr) {
    sums[plane] = found.q;
    sums[all + plane] = found.q_deviation;
    return;
  }
  const float scale = o.planes[all + plane],
              share = scale / -static_cast<float>(o.shape.pixels > 0 ? o.shape.pixels : 1);
  terms[plane] = found.q * share;
  terms[all + plane] = found.q_deviation * share * scale * scale;
}

}  // namespace

void backward_sums(const Settings& settings, const Operands& o, const Division& d,
                   const Rows& dgamma, const Rows& dbeta, float* parts) {
  specialised(settings, o, [&](auto vector, auto last, auto whole, auto is_silu) {
    launch(backward_sums_kernel<vector(), last(), whole(), is_silu()>, settings, d,
           d.shared(1, last() ? vector() : 1), o, d, dgamma, dbeta, parts);
  });
}

void combine_sums(const Settings& settings, const Operands& o, int64_t splits, const float* parts,
                  float* sums, float* terms) {
  launch_combination<Sums>(combine_sums_kernel, settings, o, splits, parts, sums, terms);
}

}  // namespace spade_fast
