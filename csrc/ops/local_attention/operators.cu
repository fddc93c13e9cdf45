// Local attention on the GPU, on torch's stable ABI; the kernels are in kernels.cuh. Bias and
// weights are float32 where query, key and value are of a half type.
#include "ops/local_attention/kernels.cuh"

#include <type_traits>

#include "ops/common/gpu.h"
#include "ops/local_attention/operands.h"

namespace pmvis {
namespace {

constexpr Requirement require = WindowOperands::require;
constexpr const char* kApart = "tensors must be on one device";

template <typename T>
struct Type {
  using type = T;
};

// Calls run(Type<T>) for the operands' type; what belongs to windows is of Sum<T>.
template <typename Run>
void for_type(const WindowOperands& call, const Tensor& windows, const Run& run) {
  const int32_t dtype = call.value.dtype();
  const bool wide = dtype == aoti_torch_dtype_float64();
  require(wide || dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_float16() ||
              dtype == aoti_torch_dtype_bfloat16(),
          "value must be of a float type");
  require(windows.dtype() == (wide ? dtype : aoti_torch_dtype_float32()),
          "bias and weights must be float32, or float64 as value");
  require(call.height <= kMaxGrid && call.batch() <= kMaxGrid, "there are too many maps or rows");
  if (wide) return run(Type<double>());
  if (dtype == aoti_torch_dtype_float16()) return run(Type<Half>());
  if (dtype == aoti_torch_dtype_bfloat16()) return run(Type<Bfloat>());
  run(Type<float>());
}

// Products of `query` with the windows of `map`, as window_scores has them.
template <typename T>
void scores(const WindowOperands& call, const Gpu& gpu, const Tensor& query, const Tensor& map,
            const Sum<T>* terms, const Sum<T>* weights, const Tensor& output) {
  if (output.numel() == 0) return;
  const int side = static_cast<int>(call.side);
  gpu.launch(&window_scores<T>,
             {blocks(call.width, kCells), static_cast<unsigned>(call.height),
              static_cast<unsigned>(call.batch())},
             kScorers, sizeof(Sum<T>) * kCells * side * side, query.data<const T>(),
             map.data<const T>(), terms, weights, output.data<Sum<T>>(),
             static_cast<int>(call.height), static_cast<int>(call.width),
             static_cast<int>(map.size(2)), side);
}

template <typename T, int N, bool gathers>
void sums_of(const WindowOperands& call, const Gpu& gpu, const Tensor& map, const Tensor& weights,
             const Tensor& output) {
  const int64_t channels = map.size(2), vectors = (channels + N - 1) / N;
  const unsigned threads = vectors < 128 ? 32 * blocks(vectors, 32) : 128;
  const int side = static_cast<int>(call.side);
  gpu.launch(&window_sums<T, N, gathers>,
             {blocks(call.width, kCells) * blocks(vectors, threads),
              static_cast<unsigned>(call.height), static_cast<unsigned>(call.batch())},
             threads, sizeof(Sum<T>) * kCells * side * (kCells + side - 1), map.data<const T>(),
             weights.data<const Sum<T>>(), output.data<T>(), static_cast<int>(call.height),
             static_cast<int>(call.width), static_cast<int>(channels), side);
}

// Sums of `map` over windows, as window_sums has them.
template <typename T, bool gathers>
void sums(const WindowOperands& call, const Gpu& gpu, const Tensor& map, const Tensor& weights,
          const Tensor& output) {
  if (output.numel() == 0) return;
  // Few channels fill more threads one by one.
  const bool vectors = map.size(2) % 4 == 0 && map.size(2) >= 256 &&
                       reinterpret_cast<uintptr_t>(map.data<T>()) % 32 == 0;
  (vectors ? sums_of<T, 4, gathers> : sums_of<T, 1, gathers>)(call, gpu, map, weights, output);
}

// local_attention(query, key, value, bias, height, width) -> sums, weights
void forward_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor query(stack[0]), key(stack[1]), value(stack[2]), bias(stack[3]);
  const WindowOperands call(query, key, value, bias, static_cast<int64_t>(stack[4]),
                            static_cast<int64_t>(stack[5]), kMaxWindow);
  const Gpu gpu(value);
  require(gpu.holds(query) && gpu.holds(key) && gpu.holds(bias), kApart);
  Tensor output = Tensor::empty_like(value), weights = Tensor::empty_like(bias);
  for_type(call, bias, [&](auto type) {
    using T = typename decltype(type)::type;
    scores<T>(call, gpu, query, key, bias.data<const Sum<T>>(), nullptr, weights);
    sums<T, false>(call, gpu, value, weights, output);
  });
  stack[0] = output.release();
  stack[1] = weights.release();
}

// local_attention_backward(grad, grad_weights, query, key, value, weights, height, width) ->
// gradients of query, key, value and bias
void backward_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad(stack[0]), grad_weights(stack[1]), query(stack[2]), key(stack[3]),
      value(stack[4]), weights(stack[5]);
  const WindowOperands call(query, key, value, weights, static_cast<int64_t>(stack[6]),
                            static_cast<int64_t>(stack[7]), kMaxWindow);
  const Gpu gpu(value);
  const bool two = grad_weights.numel() != 0;  // weights may be of no interest
  call.require_gradient(grad);
  if (two) call.require_windows(grad_weights);
  require(grad_weights.dtype() == weights.dtype(), "the weights' gradient must be of their type");
  require(gpu.holds(grad) && gpu.holds(query) && gpu.holds(key) && gpu.holds(weights) &&
              (!two || gpu.holds(grad_weights)),
          kApart);
  Tensor grad_query = Tensor::empty_like(query), grad_key = Tensor::empty_like(key);
  Tensor grad_value = Tensor::empty_like(value), grad_bias = Tensor::empty_like(weights);
  for_type(call, weights, [&](auto type) {
    using T = typename decltype(type)::type;
    scores<T>(call, gpu, grad, value, two ? grad_weights.data<const Sum<T>>() : nullptr,
              weights.data<const Sum<T>>(), grad_bias);
    sums<T, false>(call, gpu, key, grad_bias, grad_query);
    sums<T, true>(call, gpu, query, grad_bias, grad_key);
    sums<T, true>(call, gpu, grad, weights, grad_value);
  });
  stack[0] = grad_query.release();
  stack[1] = grad_key.release();
  stack[2] = grad_value.release();
  stack[3] = grad_bias.release();
}

[[maybe_unused]] const bool registered =
    register_kernels(kKey, {{"local_attention", forward_kernel},
                            {"local_attention_backward", backward_kernel}});

}  // namespace
}  // namespace pmvis
