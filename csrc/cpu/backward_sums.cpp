// backward_sums on the CPU: dγ = g·x̂, dβ = g, and the sums Σq and Σq·(x − shift) of every plane,
// with q = g·(addend + γ).
//
// dy, x, γ and one bit (or β) per element are read once. The tasks' partial sums are added in
// double precision and in a fixed order, so that the result does not depend on the number of
// threads.

#include "table_sums.h"

namespace spade_fast {
namespace {

template <typename Sum, typename Number>
struct BackwardSumsBlock {
  // Adds to the sums of one plane (a block of its pixels), or to the sums of each channel (a block
  // of a pixel's channels).
  static ALWAYS_INLINE void run(int64_t count, BackwardBlock<Sum> block, Number shift, Number scale,
                                Number offset, Activation activation, Sum negative_slope,
                                Sum addend, Destination<Sum> dgamma_place,
                                Destination<Sum> dbeta_place, Sum* q_sums, Sum* q_deviation_sums) {
    Sum buffer[kBlock], g[kBlock], deviation[kBlock], dgamma[kBlock];
    const Sum* gamma = block.gamma.read(count, buffer);
    gradient(count, block, gamma, shift, scale, offset, activation, negative_slope, addend, g,
             deviation);
    if (dbeta_place.data != nullptr) dbeta_place.write(count, g);
    if constexpr (std::is_same_v<Number, Uniform<Sum>>) {
      Sum q_sum = 0, q_deviation_sum = 0;
#pragma omp simd reduction(+ : q_sum, q_deviation_sum)
      for (int64_t i = 0; i < count; ++i) {
        dgamma[i] = g[i] * (deviation[i] * scale[i] + offset[i]);
        const Sum q = g[i] * (addend + gamma[i]);
        q_sum += q;
        q_deviation_sum += q * deviation[i];
      }
      *q_sums += q_sum;
      *q_deviation_sums += q_deviation_sum;
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        dgamma[i] = g[i] * (deviation[i] * scale[i] + offset[i]);
        const Sum q = g[i] * (addend + gamma[i]);
        q_sums[i] += q;
        q_deviation_sums[i] += q * deviation[i];
      }
    }
    dgamma_place.write(count, dgamma);
  }
};

}  // namespace

std::tuple<Tensor, Tensor> new_dense_gradients(const Tensor& x, Layout layout,
                                               Activation activation, ScalarType dtype) {
  return {new_output(x, layout, dtype), activation == Activation::none
                                            ? new_tensor(x, {0}, dtype)
                                            : new_output(x, layout, dtype)};
}

template <typename Sum>
void sums_task(const Tasks& tasks, int64_t task, const Operands<Sum>& m, const Source<Sum>& dy,
               const Target<Sum>& dgamma, const Target<Sum>& dbeta, Sum* found) {
  const int64_t width = tasks.width;
  BackwardReader<Sum> reader(m, dy, true);
  tasks.for_each_block(task, [&](int64_t n, int64_t row, int64_t start, int64_t count,
                                 int64_t number) {
    Sum* sums = found + (tasks.layout == Layout::contiguous ? 0 : start);
    const auto run = [&](auto shift, auto scale, auto offset) {
      vectorised<BackwardSumsBlock<Sum, decltype(shift)>>(
          count, reader.at(n, row, start), shift, scale, offset, m.activation, m.negative_slope,
          m.addend, dgamma.at(n, row, start), dbeta.at(n, row, start), sums, sums + width);
    };
    if (tasks.layout == Layout::contiguous) {
      run(m.planes.uniform(0, number), m.planes.uniform(1, number), m.planes.uniform(2, number));
    } else {
      run(m.planes.per_channel(0, number), m.planes.per_channel(1, number),
          m.planes.per_channel(2, number));
    }
  });
}

template void sums_task(const Tasks&, int64_t, const Operands<float>&, const Source<float>&,
                        const Target<float>&, const Target<float>&, float*);
template void sums_task(const Tasks&, int64_t, const Operands<double>&, const Source<double>&,
                        const Target<double>&, const Target<double>&, double*);

template <typename Sum>
void combine_sums(const Tasks& tasks, int64_t unit, const Sum* found, Sum* sums) {
  const int64_t width = tasks.width, first = tasks.first_plane(unit), count = tasks.planes_of(unit);
  if (tasks.parts == 1) {
    std::copy_n(found, count, sums + first);
    std::copy_n(found + width, count, sums + tasks.planes() + first);
    return;
  }
  std::vector<double> total(2 * width);
  for (int64_t part = 0; part < tasks.parts; ++part) {
    for (int64_t i = 0; i < 2 * width; ++i) total[i] += found[2 * width * part + i];
  }
  std::copy_n(total.begin(), count, sums + first);
  std::copy_n(total.begin() + width, count, sums + tasks.planes() + first);
}

template void combine_sums(const Tasks&, int64_t, const float*, float*);
template void combine_sums(const Tasks&, int64_t, const double*, double*);

namespace {

// The sums as a tensor [2, N, C] in the dtype of `planes`.
template <typename Sum>
Tensor as_planes(const std::vector<Sum>& sums, const Tasks& tasks, const Tensor& planes) {
  const Tensor result = new_tensor(planes, {2, tasks.batch, tasks.channels}, planes.scalar_type());
  dispatch_sum(planes.scalar_type(), [&](auto zero) {
    std::copy(sums.begin(), sums.end(), result.mutable_data_ptr<decltype(zero)>());
  });
  return result;
}

template <typename Sum>
std::tuple<Tensor, Tensor, Tensor> dense_sums(const Tasks& tasks, const Operands<Sum>& modulation,
                                              const Source<Sum>& dy, const Tensor& x,
                                              const Tensor& planes, ScalarType dtype) {
  const auto [dgamma, dbeta] = new_dense_gradients(x, tasks.layout, modulation.activation, dtype);
  const Target<Sum> dgamma_target(dgamma, tasks.layout), dbeta_target(dbeta, tasks.layout);
  const int64_t width = 2 * tasks.width;
  std::vector<Sum> found(width * tasks.count()), sums(2 * tasks.planes());
  tasks.for_each([&](int64_t task) {
    sums_task(tasks, task, modulation, dy, dgamma_target, dbeta_target, &found[width * task]);
  });
  for (int64_t unit = 0; unit < tasks.units(); ++unit)
    combine_sums(tasks, unit, &found[width * unit * tasks.parts], sums.data());
  return {finished(dgamma, x, tasks.layout), finished(dbeta, x, tasks.layout),
          as_planes(sums, tasks, planes)};
}

template <typename Sum>
std::tuple<Tensor, Tensor, Tensor> table_sums(const Tasks& tasks, const Operands<Sum>& modulation,
                                              const Source<Sum>& dy, const Tensor& gamma,
                                              const Tensor& index, const Tensor& order,
                                              const Tensor& planes) {
  const auto new_gradient = [&] {
    return torch::stable::new_zeros(gamma, {gamma.size(0), tasks.channels}, kScalarType<Sum>);
  };
  const Tensor dgamma = new_gradient(), dbeta = new_gradient();
  const int64_t width = 2 * tasks.width;
  std::vector<Sum> found(width * tasks.count()), sums(2 * tasks.planes());
  sum_table(tasks, modulation, dy, SortedPixels(index, order, tasks, gamma.size(0)),
            dgamma.template mutable_data_ptr<Sum>(), dbeta.template mutable_data_ptr<Sum>(),
            found.data());
  for (int64_t unit = 0; unit < tasks.units(); ++unit)
    combine_sums(tasks, unit, &found[width * unit * tasks.parts], sums.data());
  return {in_dtype(dgamma, gamma.scalar_type()), in_dtype(dbeta, gamma.scalar_type()),
          as_planes(sums, tasks, planes)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> backward_sums(const Tensor& dy, const Tensor& x,
                                                 const Tensor& planes, const Tensor& gamma,
                                                 std::optional<Tensor> beta,
                                                 std::optional<Tensor> index,
                                                 std::optional<Tensor> order, const Tensor& signs,
                                                 std::optional<std::string> activation_name,
                                                 double negative_slope, bool plus_one) {
  const Activation activation = activation_named(activation_name);
  check_backward_sums(dy, x, planes, gamma, beta, index, order, signs, activation);
  check_index(index, gamma);
  const Layout layout = layout_of(x);
  const Tasks tasks(x, layout, index.has_value());
  std::tuple<Tensor, Tensor, Tensor> found;
  dispatch_sum(promoted(x.scalar_type(), gamma.scalar_type()), [&](auto zero) {
    using Sum = decltype(zero);
    const Operands<Sum> modulation(x, planes, gamma, beta, index, activation, negative_slope,
                                   plus_one, signs, layout);
    const Source<Sum> source(dy, layout);
    found = index ? table_sums(tasks, modulation, source, gamma, *index, *order, planes)
                  : dense_sums(tasks, modulation, source, x, planes, gamma.scalar_type());
  });
  return found;
}

STABLE_TORCH_LIBRARY_IMPL(spade_fast, CPU, library) {
  library.impl("backward_sums", TORCH_BOX(&backward_sums));
}

}  // namespace spade_fast
