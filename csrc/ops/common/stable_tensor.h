// What the boxed kernels share on top of torch's stable ABI: owned tensors, checks, torch's threads
// and registration. A boxed kernel reads its arguments from the slots of a stack and writes its
// results there from slot 0; the schemas are in pmvis_core/ops/library.py.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "ops/common/stable_abi.h"

#if !defined(PMVIS_NAMESPACE)
#define PMVIS_NAMESPACE "pmvis"  // of the operators
#endif

namespace pmvis {

// Goes up with every change of a schema or of what a kernel does; pmvis_core/ops/library.py asks
// for the same.
constexpr int kSchemas = 3;

inline void check(AOTITorchError error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("pmvis: torch failed at ") + what);
}

// Refuses what a kernel cannot read, in the name of its operator.
struct Requirement {
  const char* name;
  void operator()(bool good, const char* what) const {
    if (!good) throw std::runtime_error(std::string("pmvis::") + name + ": " + what);
  }
};

// Owns a tensor handle.
class Tensor {
 public:
  explicit Tensor(StableIValue slot) : handle_(reinterpret_cast<AtenTensorHandle>(slot)) {
    int64_t* strides = nullptr;
    check(aoti_torch_get_dim(handle_, &dim_), "dim");
    check(aoti_torch_get_sizes(handle_, &sizes_), "sizes");
    check(aoti_torch_get_strides(handle_, &strides), "strides");
    check(aoti_torch_get_dtype(handle_, &dtype_), "dtype");
    check(aoti_torch_get_data_ptr(handle_, &data_), "data");
    int64_t step = 1;
    for (int64_t d = dim_; d-- > 0;) {
      if (sizes_[d] > 1 && strides[d] != step) contiguous_ = false;
      step *= sizes_[d];
    }
    if (step == 0) contiguous_ = true;
    numel_ = step;
  }
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(data_, other.data_);
    std::swap(sizes_, other.sizes_);
    std::swap(dim_, other.dim_);
    std::swap(numel_, other.numel_);
    std::swap(dtype_, other.dtype_);
    std::swap(contiguous_, other.contiguous_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  static Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype,
                      int32_t device = aoti_torch_device_type_cpu(), int32_t index = 0) {
    return empty(static_cast<int64_t>(sizes.size()), sizes.begin(), dtype, device, index);
  }
  static Tensor empty_like(const Tensor& other) {
    int32_t device = 0, index = 0;
    other.where(&device, &index);
    return empty(other.dim_, other.sizes_, other.dtype_, device, index);
  }

  template <typename T>
  T* data() const {
    return static_cast<T*>(data_);
  }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int64_t numel() const { return numel_; }
  int32_t dtype() const { return dtype_; }
  bool contiguous() const { return contiguous_; }
  // Whether the sizes are these; -1 stands for any.
  bool is(std::initializer_list<int64_t> sizes) const {
    if (dim_ != static_cast<int64_t>(sizes.size())) return false;
    const int64_t* size = sizes_;
    for (const int64_t wanted : sizes) {
      if (wanted != -1 && wanted != *size) return false;
      ++size;
    }
    return true;
  }
  void where(int32_t* device, int32_t* index) const {
    check(aoti_torch_get_device_type(handle_, device), "device");
    check(aoti_torch_get_device_index(handle_, index), "device index");
  }
  // Hands the handle over to torch.
  StableIValue release() {
    return reinterpret_cast<StableIValue>(std::exchange(handle_, nullptr));
  }

 private:
  static Tensor empty(int64_t dim, const int64_t* sizes, int32_t dtype, int32_t device,
                      int32_t index) {
    int64_t strides[8];
    int64_t step = 1;
    for (int64_t d = dim; d-- > 0;) {
      strides[d] = step;
      step *= sizes[d] > 1 ? sizes[d] : 1;
    }
    AtenTensorHandle handle = nullptr;
    check(aoti_torch_empty_strided(dim, sizes, strides, dtype, device, index, &handle), "empty");
    return Tensor(reinterpret_cast<StableIValue>(handle));
  }

  AtenTensorHandle handle_ = nullptr;
  void* data_ = nullptr;
  int64_t* sizes_ = nullptr;
  int64_t dim_ = 0;
  int64_t numel_ = 0;
  int32_t dtype_ = 0;
  bool contiguous_ = true;
};

// A float argument.
inline double number(StableIValue slot) {
  double value;
  std::memcpy(&value, &slot, sizeof value);
  return value;
}

// A bool argument: its byte is the lowest.
inline bool flag(StableIValue slot) { return (slot & 0xff) != 0; }

// Runs body(begin, end) on torch's threads. The body must not throw.
template <typename Body>
void parallel_for(int64_t end, int64_t grain, const Body& body) {
  auto call = [](int64_t from, int64_t to, void* context) {
    (*static_cast<const Body*>(context))(from, to);
  };
  check(torch_parallel_for(0, end, grain, call, const_cast<Body*>(&body)), "parallel_for");
}

struct Kernel {
  const char* name;
  void (*call)(StableIValue* stack, uint64_t, uint64_t);
};

// Whether torch refused a kernel of this library.
inline bool& refused() {
  static bool value = false;
  return value;
}

// Registers kernels under a dispatch key ("CPU", "CUDA"); the handle lives as long as the process.
inline bool register_kernels(const char* key, std::initializer_list<Kernel> kernels) {
  TorchLibraryHandle library = nullptr;
  bool good = aoti_torch_library_init_impl(PMVIS_NAMESPACE, key, __FILE__, __LINE__, &library) == 0;
  for (const Kernel& kernel : kernels) {
    good = good && torch_library_impl(library, kernel.name, kernel.call, kTorchAbi) == 0;
  }
  if (!good) refused() = true;
  return good;
}

}  // namespace pmvis
