// What every operator for CUDA needs of PyTorch: x's device and stream, and where operators are registered.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common/tensors.h"
#include "device.h"

#ifndef SPADE_FAST_NAMESPACE
#define SPADE_FAST_NAMESPACE spade_fast
#define SPADE_FAST_DISPATCH_KEY CUDA
#endif

#ifndef SPADE_FAST_ON_HOST
namespace spade_fast {
namespace {

// Makes x's device the current one for as long as this lives.
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

}  // namespace
}  // namespace spade_fast
#endif
