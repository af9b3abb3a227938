// What every CUDA operator needs of PyTorch: the device and stream of x, dtypes, and the namespace
// in which operators are registered.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common/tensors.h"
#include "operands.h"

#ifndef SPADE_FAST_NAMESPACE
#define SPADE_FAST_NAMESPACE spade_fast
#define SPADE_FAST_DISPATCH_KEY CUDA
#endif

namespace spade_fast {

#ifndef SPADE_FAST_ON_HOST
// Makes x's device the current one during its lifetime.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    check(cudaSetDevice(x.get_device_index()));  // for this library's own copy of the CUDA runtime
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<Stream>(stream);
  }

  Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_;
};
#endif

inline Type type_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Type::float32;
    case ScalarType::BFloat16:
      return Type::bfloat16;
    case ScalarType::Half:
      return Type::float16;
    default:
      STD_TORCH_CHECK(false, "spade_fast: ", name,
                      " should be float32, bfloat16 or float16: the kernels accumulate in float32");
  }
}

}  // namespace spade_fast
