// backward_sums on the CPU: dγ = g·x̂, dβ = g, and the sums Σq and Σq·(x − shift) of every plane, q = g·(1 + γ).
//
// dy, x, γ and a bit (or β) of each element are read once. The tasks' sums are added up in double precision, always in the same
// order, so that the number of threads does not change a bit.

#include <tuple>

#include "table_sums.h"

namespace spade_fast {
namespace {

template <typename Sum, typename Number>
struct BackwardSumsBlock {
  // Adds to sums of one plane (a block of its pixels), or to those of each channel (a block of a pixel's channels). dbeta may be
  // null.
  static ALWAYS_INLINE void run(int64_t count, const Sum* dy, const Sum* x, const Sum* gamma, const Sum* beta, const uint8_t* signs,
                                Number shift, Number scale, Number offset, Activation activation, Sum negative_slope, Sum* dgamma,
                                Sum* dbeta, Sum* q_sums, Sum* q_deviation_sums) {
    Sum g[kBlock], deviation[kBlock];
    gradient(count, dy, x, gamma, beta, signs, shift, scale, offset, activation, negative_slope, g, deviation);
    if (dbeta != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) dbeta[i] = g[i];
    }
    if constexpr (std::is_same_v<Number, Uniform<Sum>>) {
      Sum q_sum = 0, q_deviation_sum = 0;
#pragma omp simd reduction(+ : q_sum, q_deviation_sum)
      for (int64_t i = 0; i < count; ++i) {
        dgamma[i] = g[i] * (deviation[i] * scale[i] + offset[i]);
        const Sum q = g[i] * (1 + gamma[i]);
        q_sum += q;
        q_deviation_sum += q * deviation[i];
      }
      *q_sums += q_sum;
      *q_deviation_sums += q_deviation_sum;
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        dgamma[i] = g[i] * (deviation[i] * scale[i] + offset[i]);
        const Sum q = g[i] * (1 + gamma[i]);
        q_sums[i] += q;
        q_deviation_sums[i] += q * deviation[i];
      }
    }
  }
};

// What each task found, [2, width]: width is 1 for a part of a plane, C for a band of pixels.
template <typename Sum>
void sum_all(const Tasks& tasks, const BackwardSources<Sum>& sources, const Target<Sum>& dgamma,
             const std::optional<Target<Sum>>& dbeta, int64_t width, Sum* found) {
  tasks.for_each([&](int64_t task) {
    Sum* sums = found + 2 * width * task;
    Sum buffers[2][kBlock];
    tasks.for_each_block(task, [&](int64_t n, int64_t row, int64_t start, int64_t count, int64_t number) {
      Sum* block_dgamma = dgamma.place(n, row, start, buffers[0]);
      Sum* block_dbeta = dbeta ? dbeta->place(n, row, start, buffers[1]) : nullptr;
      const int64_t place = width == 1 ? 0 : start;
      sources.read(n, row, start, count, [&](auto... elements) {
        const auto run = [&](auto... numbers) {
          using Number = std::common_type_t<decltype(numbers)...>;
          vectorised<BackwardSumsBlock<Sum, Number>>(count, elements..., numbers..., sources.activation, sources.negative_slope,
                                                     block_dgamma, block_dbeta, sums + place, sums + width + place);
        };
        const Numbers<Sum>& planes = sources.planes;
        if (tasks.layout == Layout::contiguous) {
          run(planes.uniform(0, number), planes.uniform(1, number), planes.uniform(2, number));
        } else {
          run(planes.per_channel(0, number), planes.per_channel(1, number), planes.per_channel(2, number));
        }
      });
      dgamma.write(n, row, start, count, block_dgamma);
      if (dbeta) dbeta->write(n, row, start, count, block_dbeta);
    });
  });
}

// Adds up what the tasks found to [2, N, C].
template <typename Sum>
void combine(const Tasks& tasks, const Sum* found, Sum* sums) {
  const bool contiguous = tasks.layout == Layout::contiguous;
  std::vector<double> total(tasks.channels);
  for (int64_t which = 0; which < 2; ++which) {
    for (int64_t n = 0; n < tasks.batch; ++n) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t part = 0; part < tasks.parts; ++part) {
        for (int64_t c = 0; c < tasks.channels; ++c) {
          total[c] += contiguous ? found[((n * tasks.channels + c) * tasks.parts + part) * 2 + which]
                                 : found[((n * tasks.parts + part) * 2 + which) * tasks.channels + c];
        }
      }
      std::copy(total.begin(), total.end(), sums + (which * tasks.batch + n) * tasks.channels);
    }
  }
}

// Σq and Σq·(x − shift), [2, N, C], as `planes` are held.
template <typename Sum>
Tensor as_planes(const std::vector<Sum>& sums, const Tasks& tasks, const Tensor& planes) {
  const Tensor result = torch::stable::new_empty(planes, {2, tasks.batch, tasks.channels}, planes.scalar_type());
  dispatch_sum(planes.scalar_type(), [&](auto zero) {
    std::copy(sums.begin(), sums.end(), result.mutable_data_ptr<decltype(zero)>());
  });
  return result;
}

template <typename Sum>
std::tuple<Tensor, Tensor, Tensor> dense_sums(const Tasks& tasks, const BackwardSources<Sum>& sources, const Tensor& x,
                                              const Tensor& planes, ScalarType dtype) {
  const bool has_activation = sources.activation != Activation::none;
  const int64_t width = tasks.layout == Layout::contiguous ? 1 : tasks.channels;
  const Tensor dgamma = new_output(x, tasks.layout, dtype);
  const Tensor dbeta = has_activation ? new_output(x, tasks.layout, dtype) : torch::stable::new_empty(x, {0}, dtype);
  std::optional<Target<Sum>> dbeta_target;
  if (has_activation) dbeta_target.emplace(dbeta, tasks.layout);
  std::vector<Sum> found(tasks.count() * 2 * width, Sum(0)), sums(2 * tasks.batch * tasks.channels);
  sum_all<Sum>(tasks, sources, Target<Sum>(dgamma, tasks.layout), dbeta_target, width, found.data());
  combine(tasks, found.data(), sums.data());
  return {finished(dgamma, x, tasks.layout), has_activation ? finished(dbeta, x, tasks.layout) : dbeta,
          as_planes(sums, tasks, planes)};
}

template <typename Sum>
std::tuple<Tensor, Tensor, Tensor> table_sums(const Tasks& tasks, const BackwardSources<Sum>& sources, const Tensor& gamma,
                                              const Tensor& index, const Tensor& order, const Tensor& planes) {
  const bool contiguous = tasks.layout == Layout::contiguous;
  const SortedPixels sorted(index, order, tasks.pixels);
  const int64_t rows = gamma.size(0);
  std::vector<int64_t> sizes = {rows, tasks.channels};
  if (contiguous) std::swap(sizes[0], sizes[1]);
  Tensor dgamma = torch::stable::new_zeros(gamma, sizes, kScalarType<Sum>);
  Tensor dbeta = torch::stable::new_zeros(gamma, sizes, kScalarType<Sum>);
  Sum *dgamma_data = dgamma.template mutable_data_ptr<Sum>(), *dbeta_data = dbeta.template mutable_data_ptr<Sum>();
  std::vector<Sum> sums(2 * tasks.batch * tasks.channels);
  if (contiguous) {
    sum_table_by_planes(tasks, sources, sorted, rows, dgamma_data, dbeta_data, sums.data());
    dgamma = torch::stable::transpose(dgamma, 0, 1), dbeta = torch::stable::transpose(dbeta, 0, 1);
  } else {
    std::vector<Sum> found(tasks.count() * 2 * tasks.channels, Sum(0));
    sum_table_by_pixels(tasks, sources, sorted, dgamma_data, dbeta_data, found.data());
    combine(tasks, found.data(), sums.data());
  }
  const auto finish = [&](const Tensor& x) { return torch::stable::contiguous(torch::stable::to(x, gamma.scalar_type())); };
  return {finish(dgamma), finish(dbeta), as_planes(sums, tasks, planes)};
}

std::tuple<Tensor, Tensor, Tensor> backward_sums(const Tensor& dy, const Tensor& x, const Tensor& planes, const Tensor& gamma,
                                                 std::optional<Tensor> beta, std::optional<Tensor> index, std::optional<Tensor> order,
                                                 const Tensor& signs, std::optional<std::string> activation_name,
                                                 double negative_slope) {
  const Layout layout = layout_of(x);
  const Tasks tasks(x, layout);
  std::tuple<Tensor, Tensor, Tensor> found;
  dispatch_sum(promoted(x.scalar_type(), gamma.scalar_type()), [&](auto zero) {
    using Sum = decltype(zero);
    const BackwardSources<Sum> sources(dy, x, planes, gamma, beta, index, signs, activation_named(activation_name), negative_slope,
                                       layout);
    found = index ? table_sums(tasks, sources, gamma, *index, *order, planes)
                  : dense_sums(tasks, sources, x, planes, gamma.scalar_type());
  });
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, library) {
  library.impl("backward_sums", TORCH_BOX(&backward_sums));
}

}  // namespace spade_fast
