// Schemas of the pmvis operators and their CPU kernels, on torch's stable ABI. Gradients and shape
// functions are registered from Python (pmvis_core/ops.py).
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "deformable_attention.h"
#include "stable_abi.h"

namespace pmvis {
namespace {

void check(AOTITorchError error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("pmvis: torch failed at ") + what);
}

void require(bool good, const char* what) {
  if (!good) throw std::runtime_error(std::string("pmvis::deformable_attention: ") + what);
}

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
  }
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(data_, other.data_);
    std::swap(sizes_, other.sizes_);
    std::swap(dim_, other.dim_);
    std::swap(dtype_, other.dtype_);
    std::swap(contiguous_, other.contiguous_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  static Tensor empty(int64_t dim, const int64_t* sizes, int32_t dtype) {
    int64_t strides[8];
    int64_t step = 1;
    for (int64_t d = dim; d-- > 0;) {
      strides[d] = step;
      step *= sizes[d] > 1 ? sizes[d] : 1;
    }
    AtenTensorHandle handle = nullptr;
    check(aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0,
                                   &handle),
          "empty");
    return Tensor(reinterpret_cast<StableIValue>(handle));
  }
  static Tensor empty_like(const Tensor& other) {
    return empty(other.dim_, other.sizes_, other.dtype_);
  }

  template <typename T>
  T* data() const {
    return static_cast<T*>(data_);
  }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int32_t dtype() const { return dtype_; }
  bool contiguous() const { return contiguous_; }
  // Hands the handle over to torch.
  StableIValue release() {
    return reinterpret_cast<StableIValue>(std::exchange(handle_, nullptr));
  }

 private:
  AtenTensorHandle handle_ = nullptr;
  void* data_ = nullptr;
  int64_t* sizes_ = nullptr;
  int64_t dim_ = 0;
  int32_t dtype_ = 0;
  bool contiguous_ = true;
};

#if defined(PMVIS_X86_ISA)
bool use_avx2() {
  static const bool chosen = [] {
    const char* wish = std::getenv("PMVIS_CPU_ISA");
    if (wish != nullptr && std::strcmp(wish, "base") == 0) return false;
    return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
  }();
  return chosen;
}
#endif

template <typename T>
void forward_rows(const Attention<T>& call, T* output, int64_t begin, int64_t end) {
#if defined(PMVIS_X86_ISA)
  if (use_avx2()) return avx2::forward(call, output, begin, end);
#endif
  base::forward(call, output, begin, end);
}

template <typename T>
void backward_heads(const Attention<T>& call, const Gradients<T>& gradients, int64_t begin,
                    int64_t end) {
#if defined(PMVIS_X86_ISA)
  if (use_avx2()) return avx2::backward(call, gradients, begin, end);
#endif
  base::backward(call, gradients, begin, end);
}

// Runs body(begin, end) on torch's threads.
template <typename Body>
void parallel_for(int64_t end, int64_t grain, const Body& body) {
  auto call = [](int64_t from, int64_t to, void* context) {
    (*static_cast<const Body*>(context))(from, to);
  };
  check(torch_parallel_for(0, end, grain, call, const_cast<Body*>(&body)), "parallel_for");
}

// Cells of a level along one axis: float32 must count them exactly.
constexpr int64_t kMaxSide = (1 << 24) - 1;

void require_shapes(const Tensor& value, const Tensor& shapes, const Tensor& locations,
                    const Tensor& weights) {
  require(value.dim() == 4 && locations.dim() == 6 && weights.dim() == 5 && shapes.dim() == 2,
          "value, shapes, locations and weights must have 4, 2, 6 and 5 dimensions");
  require(shapes.dtype() == aoti_torch_dtype_int64() && shapes.size(1) == 2,
          "shapes must be (L, 2) int64");
  require(locations.dtype() == value.dtype() && weights.dtype() == value.dtype(),
          "value, locations and weights must have one type");
  require(value.contiguous() && shapes.contiguous() && locations.contiguous() &&
              weights.contiguous(),
          "tensors must be contiguous");
  require(locations.size(0) == value.size(0) && locations.size(2) == value.size(2) &&
              locations.size(3) == shapes.size(0) && locations.size(5) == 2,
          "locations must be (B, Q, M, L, P, 2)");
  for (int64_t d = 0; d < 5; ++d) {
    require(weights.size(d) == locations.size(d), "weights must be (B, Q, M, L, P)");
  }
  require(weights.size(3) * weights.size(4) <= kMaxPoints, "too many levels x points");
  require(value.size(1) <= INT32_MAX, "too many tokens");
  int64_t tokens = 0;
  for (int64_t level = 0; level < shapes.size(0); ++level) {
    const int64_t* shape = shapes.data<const int64_t>() + 2 * level;
    require(shape[0] > 0 && shape[1] > 0 && shape[0] <= kMaxSide && shape[1] <= kMaxSide,
            "every level must have a positive height and width below 2^24");
    tokens += shape[0] * shape[1];
    require(tokens <= value.size(1), "the levels hold more tokens than value");
  }
  require(tokens == value.size(1), "the levels hold fewer tokens than value");
}

template <typename T>
Attention<T> attention(const Tensor& value, const Tensor& shapes, const Tensor& locations,
                       const Tensor& weights) {
  return {value.data<const T>(), shapes.data<const int64_t>(), locations.data<const T>(),
          weights.data<const T>(), value.size(0), value.size(1), value.size(2), value.size(3),
          locations.size(1), locations.size(3), locations.size(4)};
}

template <typename T>
void run_forward(const Attention<T>& call, T* output) {
  const int64_t work = 1 + call.levels * call.points * call.channels;
  parallel_for(call.batch * call.heads * call.queries, 1 + (1 << 16) / work,
               [&](int64_t begin, int64_t end) { forward_rows(call, output, begin, end); });
}

template <typename T>
void run_backward(const Attention<T>& call, const Gradients<T>& gradients) {
  parallel_for(call.batch * call.heads, 1, [&](int64_t begin, int64_t end) {
    backward_heads(call, gradients, begin, end);
  });
}

// deformable_attention(value, shapes, locations, weights) -> output
void forward_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor value(stack[0]), shapes(stack[1]), locations(stack[2]), weights(stack[3]);
  require_shapes(value, shapes, locations, weights);
  const int64_t sizes[3] = {value.size(0), locations.size(1), value.size(2) * value.size(3)};
  Tensor output = Tensor::empty(3, sizes, value.dtype());
  if (value.dtype() == aoti_torch_dtype_float32()) {
    run_forward(attention<float>(value, shapes, locations, weights), output.data<float>());
  } else {
    require(value.dtype() == aoti_torch_dtype_float64(), "only float32 and float64 are known");
    run_forward(attention<double>(value, shapes, locations, weights), output.data<double>());
  }
  stack[0] = output.release();
}

// deformable_attention_backward(grad, value, shapes, locations, weights) -> three gradients
void backward_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad(stack[0]), value(stack[1]), shapes(stack[2]), locations(stack[3]),
      weights(stack[4]);
  require_shapes(value, shapes, locations, weights);
  require(grad.dim() == 3 && grad.contiguous() && grad.dtype() == value.dtype() &&
              grad.size(0) == value.size(0) && grad.size(1) == locations.size(1) &&
              grad.size(2) == value.size(2) * value.size(3),
          "the gradient must be (B, Q, M * D)");
  Tensor grad_value = Tensor::empty_like(value);
  Tensor grad_locations = Tensor::empty_like(locations);
  Tensor grad_weights = Tensor::empty_like(weights);
  if (value.dtype() == aoti_torch_dtype_float32()) {
    run_backward<float>(attention<float>(value, shapes, locations, weights),
                        {grad.data<const float>(), grad_value.data<float>(),
                         grad_locations.data<float>(), grad_weights.data<float>()});
  } else {
    require(value.dtype() == aoti_torch_dtype_float64(), "only float32 and float64 are known");
    run_backward<double>(attention<double>(value, shapes, locations, weights),
                         {grad.data<const double>(), grad_value.data<double>(),
                          grad_locations.data<double>(), grad_weights.data<double>()});
  }
  stack[0] = grad_value.release();
  stack[1] = grad_locations.release();
  stack[2] = grad_weights.release();
}

// Registers everything when the library is loaded; the two handles live as long as the process.
// A failure leaves the operators out, which pmvis_core/ops.py notices.
bool register_all() {
  TorchLibraryHandle schemas = nullptr, kernels = nullptr;
  return aoti_torch_library_init_def("pmvis", __FILE__, __LINE__, &schemas) == 0 &&
         aoti_torch_library_def(schemas,
                                "deformable_attention(Tensor value, Tensor shapes, "
                                "Tensor locations, Tensor weights) -> Tensor") == 0 &&
         aoti_torch_library_def(schemas,
                                "deformable_attention_backward(Tensor grad, Tensor value, "
                                "Tensor shapes, Tensor locations, Tensor weights) "
                                "-> (Tensor, Tensor, Tensor)") == 0 &&
         aoti_torch_library_init_impl("pmvis", "CPU", __FILE__, __LINE__, &kernels) == 0 &&
         torch_library_impl(kernels, "deformable_attention", forward_kernel, kTorchAbi) == 0 &&
         torch_library_impl(kernels, "deformable_attention_backward", backward_kernel,
                            kTorchAbi) == 0;
}

[[maybe_unused]] const bool registered = register_all();

}  // namespace
}  // namespace pmvis

extern "C" __attribute__((visibility("default"))) const char* pmvis_isa() {
#if defined(PMVIS_X86_ISA)
  if (pmvis::use_avx2()) return "avx2";
#endif
  return "base";
}
