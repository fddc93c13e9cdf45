// What the CUDA launchers share: torch's device and stream, launching, and error messages. With
// PMVIS_EMULATE the same launchers run the kernels on the CPU, for tests.
#pragma once

#include "ops/common/device.cuh"
#include "ops/common/stable_tensor.h"

#if !defined(PMVIS_EMULATE)
#include <cuda_runtime.h>
#endif

namespace pmvis {

constexpr int64_t kMaxGrid = 65535;  // blocks along y and z

#if defined(PMVIS_EMULATE)

constexpr const char* kKey = "CPU";

class Gpu {
 public:
  explicit Gpu(const Tensor& tensor) { tensor.where(&device_, &index_); }
  bool holds(const Tensor&) const { return true; }
  Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) const {
    return Tensor::empty(sizes, dtype, device_, index_);
  }
  void clear(void* data, size_t bytes) const { memset(data, 0, bytes); }
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared,
              Arguments... arguments) const {
    emulator::launch(grid, threads, shared, [=] { kernel(arguments...); });
  }

 private:
  int32_t device_ = 0, index_ = 0;
};

#else

constexpr const char* kKey = "CUDA";

// The device of a tensor, made the current one, and torch's stream on it.
class Gpu {
 public:
  explicit Gpu(const Tensor& tensor) {
    tensor.where(&device_, &index_);
    check(aoti_torch_create_cuda_guard(index_, &guard_), "device guard");
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(index_, &stream), "stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;
  ~Gpu() { aoti_torch_delete_cuda_guard(guard_); }

  bool holds(const Tensor& tensor) const {
    int32_t device = 0, index = 0;
    tensor.where(&device, &index);
    return device == device_ && index == index_;
  }
  Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) const {
    return Tensor::empty(sizes, dtype, device_, index_);
  }
  void clear(void* data, size_t bytes) const { good(cudaMemsetAsync(data, 0, bytes, stream_)); }
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared,
              Arguments... arguments) const {
    kernel<<<grid, threads, shared, stream_>>>(arguments...);
    good(cudaGetLastError());
  }

 private:
  static void good(cudaError_t error) {
    if (error != cudaSuccess) {
      throw std::runtime_error(std::string("pmvis: CUDA: ") + cudaGetErrorString(error));
    }
  }

  int32_t device_ = 0, index_ = 0;
  CUDAGuardHandle guard_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

#endif

inline unsigned blocks(int64_t number, int64_t each) {
  return static_cast<unsigned>((number + each - 1) / each);
}

}  // namespace pmvis
