// What launches share: errors that name the op, the device of the tensors, torch's current stream.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

namespace lomacs {
namespace {

inline void check_cuda(cudaError_t status, const char* op, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, "lomacs::", op, ": ", what, ": ", cudaGetErrorString(status));
}

// tensors that a kernel may read by bare pointers
inline void check_placed(const char* op, std::initializer_list<const torch::stable::Tensor*> tensors) {
  const auto& first = **tensors.begin();
  for (const auto* x : tensors) {
    STD_TORCH_CHECK(x->is_cuda() && x->get_device_index() == first.get_device_index() && x->is_contiguous(), "lomacs::",
                    op, ": all tensors must be contiguous and on one CUDA device");
  }
}

class OnDevice {
 public:
  OnDevice(int device, const char* op) {
    check_cuda(cudaGetDevice(&before_), op, "cudaGetDevice");
    if (device != before_) check_cuda(cudaSetDevice(device), op, "cudaSetDevice");
    changed_ = device != before_;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// libtorch_cuda is loaded privately by torch, so its symbols are found through its handle; without a link to
// it this library also builds beside a CPU torch.
inline cudaStream_t current_stream(int device, const char* op) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = dlsym(library != nullptr ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Get>(symbol);
  }();
  STD_TORCH_CHECK(get != nullptr, "lomacs::", op, ": this torch has no CUDA (libtorch_cuda.so is not loaded)");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == AOTI_TORCH_SUCCESS, "lomacs::", op, ": no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// a slice of a real tensor may start between two complex numbers
inline torch::stable::Tensor aligned(const torch::stable::Tensor& x, size_t bytes) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % bytes == 0 ? x : torch::stable::clone(x);
}

}  // namespace
}  // namespace lomacs
