// The CPU kernel of deformable attention on torch's stable ABI, and what `_C.so` tells of itself.
// Schemas, gradients and shape functions are in pmvis_core/ops.
#include <cstdlib>
#include <cstring>

#include "deformable_attention.h"
#include "isa.h"
#include "stable_tensor.h"

namespace pmvis {

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

namespace {

constexpr Requirement require{"deformable_attention"};

template <typename T>
void run_forward(const Attention<T>& call, T* output) {
  const int64_t work = 1 + call.levels * call.points * call.channels;
  parallel_for(call.batch * call.heads * call.queries, 1 + (1 << 16) / work,
               [&](int64_t begin, int64_t end) {
                 PMVIS_BEST_ISA(forward(call, output, begin, end));
               });
}

template <typename T>
void run_backward(const Attention<T>& call, const Gradients<T>& gradients) {
  parallel_for(call.batch * call.heads, 1, [&](int64_t begin, int64_t end) {
    PMVIS_BEST_ISA(backward(call, gradients, begin, end));
  });
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

// deformable_attention(value, shapes, locations, weights) -> output
void forward_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor value(stack[0]), shapes(stack[1]), locations(stack[2]), weights(stack[3]);
  require_shapes(value, shapes, locations, weights);
  Tensor output = Tensor::empty({value.size(0), locations.size(1), value.size(2) * value.size(3)},
                                value.dtype());
  if (value.dtype() == aoti_torch_dtype_float32()) {
    run_forward(attention<float>(value, shapes, locations, weights), output.data<float>());
  } else {
    require(value.dtype() == aoti_torch_dtype_float64(), "only float32 and float64 are known");
    run_forward(attention<double>(value, shapes, locations, weights), output.data<double>());
  }
  stack[0] = output.release();
}

// deformable_attention_backward(grad, value, shapes, locations, weights, bound) -> three gradients
void backward_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad(stack[0]), value(stack[1]), shapes(stack[2]), locations(stack[3]),
      weights(stack[4]), bound(stack[5]);  // the sums are in order anyway, so no bound is needed
  require_shapes(value, shapes, locations, weights);
  require(grad.contiguous() && grad.dtype() == value.dtype() &&
              grad.is({value.size(0), locations.size(1), value.size(2) * value.size(3)}),
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

[[maybe_unused]] const bool registered =
    register_kernels("CPU", {{"deformable_attention", forward_kernel},
                             {"deformable_attention_backward", backward_kernel}});

}  // namespace
}  // namespace pmvis

#define PMVIS_PUBLIC extern "C" __attribute__((visibility("default")))

PMVIS_PUBLIC const char* pmvis_isa() {
#if defined(PMVIS_X86_ISA)
  if (pmvis::use_avx2()) return "avx2";
#endif
  return "base";
}

// The version of the schemas that the kernels were written for; 0: torch refused them.
PMVIS_PUBLIC int pmvis_schemas() { return pmvis::refused() ? 0 : pmvis::kSchemas; }
