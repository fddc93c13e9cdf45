// Deformable attention on the GPU, on torch's stable ABI; the kernels are in
// deformable_attention.cuh. Locations and weights are float32 where the maps are of a half type.
#include "deformable_attention.cuh"

#include <type_traits>

#include "gpu.h"

namespace pmvis {
namespace {

constexpr Requirement require{"deformable_attention"};
constexpr const char* kApart = "tensors must be on one device";

// One call, checked.
struct Call {
  Tensor value, shapes, locations, weights;
  Int64 level[kMaxLevels] = {};
  int levels, tokens, heads, channels, queries, points;

  explicit Call(StableIValue* stack)
      : value(stack[0]), shapes(stack[1]), locations(stack[2]), weights(stack[3]) {
    require(value.dim() == 4 && locations.dim() == 6 && shapes.dim() == 2,
            "value, shapes and locations must have 4, 2 and 6 dimensions");
    require(value.contiguous() && shapes.contiguous() && locations.contiguous() &&
                weights.contiguous(),
            "tensors must be contiguous");
    levels = narrowed(locations.size(3), kMaxLevels, "there are more than 8 levels");
    require(shapes.dtype() == aoti_torch_dtype_int64() && shapes.is({levels, 2}) && on_cpu(shapes),
            "shapes must be (L, 2) int64 on the CPU");
    const int64_t batch = value.size(0);
    require(locations.is({batch, -1, value.size(2), levels, -1, 2}),
            "locations must be (B, Q, M, L, P, 2)");
    require(weights.is({batch, locations.size(1), value.size(2), levels, locations.size(4)}),
            "weights must be (B, Q, M, L, P)");
    tokens = narrowed(value.size(1), INT32_MAX, "there are too many tokens");
    heads = narrowed(value.size(2), kMaxGrid, "there are too many heads");
    channels = narrowed(value.size(3), 1 << 20, "there are too many channels");
    queries = narrowed(locations.size(1), INT32_MAX / 2, "there are too many queries");
    points = narrowed(locations.size(4), 1 << 16, "there are too many points");
    read_levels();
  }
  int64_t batch() const { return value.size(0); }

 private:
  static int narrowed(int64_t number, int64_t most, const char* problem) {
    require(number <= most, problem);
    return static_cast<int>(number);
  }
  static bool on_cpu(const Tensor& tensor) {
    int32_t device = 0, index = 0;
    tensor.where(&device, &index);
    return device == aoti_torch_device_type_cpu();
  }
  void read_levels() {
    int64_t sum = 0;
    for (int l = 0; l < levels; ++l) {
      const int64_t* shape = shapes.data<const int64_t>() + 2 * l;
      require(shape[0] > 0 && shape[1] > 0 && shape[0] <= kMaxSide && shape[1] <= kMaxSide,
              "every level must have a positive height and width up to 65000");
      level[l] = shape[0] << 32 | shape[1];
      sum += shape[0] * shape[1];
    }
    require(sum == tokens, "the levels must hold as many tokens as value");
  }
};

// What a tensor of T says of itself.
int32_t dtype_of(const Half*) { return aoti_torch_dtype_float16(); }
int32_t dtype_of(const Bfloat*) { return aoti_torch_dtype_bfloat16(); }
int32_t dtype_of(const float*) { return aoti_torch_dtype_float32(); }
int32_t dtype_of(const double*) { return aoti_torch_dtype_float64(); }
template <typename T>
const T* kOf = nullptr;

// Calls run(T) for the type of a tensor.
template <typename Run>
void for_type(const Tensor& value, const Run& run) {
  const int32_t dtype = value.dtype();
  if (dtype == dtype_of(kOf<float>)) return run(kOf<float>);
  if (dtype == dtype_of(kOf<Half>)) return run(kOf<Half>);
  if (dtype == dtype_of(kOf<Bfloat>)) return run(kOf<Bfloat>);
  require(dtype == dtype_of(kOf<double>), "value must be of a float type");
  run(kOf<double>);
}

template <typename A>
void require_type(const Call& call) {
  require(call.locations.dtype() == dtype_of(kOf<A>) && call.weights.dtype() == dtype_of(kOf<A>),
          "locations and weights must be float32, or float64 as value");
}

// Elements of a vector load where the channels are whole vectors, else 1.
template <typename T, int BYTES>
constexpr int kVector = BYTES / static_cast<int>(sizeof(T));

template <typename T, int N, int G>
void forward(const Call& call, const Gpu& gpu, T* output) {
  const int slices = (call.channels + G * N - 1) / (G * N);
  const int64_t rows = call.batch() * call.heads * slices;
  require(rows <= kMaxGrid, "batch x heads are too many");
  const Int64* l = call.level;
  gpu.launch(&deformable_forward<T, N, G>,
             {blocks(call.queries, kThreads / G), static_cast<unsigned>(rows)}, kThreads, 0,
             call.value.data<const T>(), call.locations.data<const Sum<T>>(),
             call.weights.data<const Sum<T>>(), output, l[0], l[1], l[2], l[3], l[4], l[5], l[6],
             l[7], call.levels, call.tokens, call.heads, call.channels, call.queries, call.points);
}

template <typename T>
void forward_of(const Call& call, const Gpu& gpu, T* output) {
  constexpr int N = kVector<T, 16>;
  if (call.channels % N != 0) return forward<T, 1, 32>(call, gpu, output);
  const int vectors = call.channels / N;
  if (vectors <= 4) return forward<T, N, 4>(call, gpu, output);
  if (vectors <= 8) return forward<T, N, 8>(call, gpu, output);
  forward<T, N, 16>(call, gpu, output);
}

// deformable_attention(value, shapes, locations, weights) -> output
void forward_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Call call(stack);
  const Gpu gpu(call.value);
  require(gpu.holds(call.locations) && gpu.holds(call.weights), kApart);
  Tensor output = gpu.empty({call.batch(), call.queries, int64_t{call.heads} * call.channels},
                            call.value.dtype());
  for_type(call.value, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    require_type<Sum<T>>(call);
    if (output.numel() != 0) forward_of<T>(call, gpu, output.data<T>());
  });
  stack[0] = output.release();
}

template <typename T, typename S, int N, int G>
void backward(const Call& call, const Gpu& gpu, const Tensor& grad, const Sum<T>* bound, S* sums,
              const Tensor& grad_locations, const Tensor& grad_weights) {
  const int64_t rows = call.batch() * call.heads;
  require(rows <= kMaxGrid, "batch x heads are too many");
  const Int64* l = call.level;
  gpu.launch(&deformable_backward<T, S, N, G>,
             {blocks(call.queries, kQueries * (kThreads / G)), static_cast<unsigned>(rows)},
             kThreads, 0, grad.data<const T>(), call.value.data<const T>(),
             call.locations.data<const Sum<T>>(), call.weights.data<const Sum<T>>(), bound, sums,
             grad_locations.data<Sum<T>>(), grad_weights.data<Sum<T>>(), l[0], l[1], l[2], l[3],
             l[4], l[5], l[6], l[7], call.levels, call.tokens, call.heads, call.channels,
             call.queries, call.points);
}

// Sums of value's gradient (as S, rounded to T after) and the other gradients.
template <typename T, typename S>
void backward_of(const Call& call, const Gpu& gpu, const Tensor& grad, const Sum<T>* bound,
                 const Tensor& grad_value, const Tensor& grad_locations,
                 const Tensor& grad_weights) {
  constexpr int N = 16 / static_cast<int>(sizeof(Sum<T>));
  constexpr bool kRounded = !std::is_same_v<S, T>;
  const int64_t number = call.value.numel();
  const Tensor room = gpu.empty({kRounded ? number * int64_t{sizeof(S)} : 0},
                                aoti_torch_dtype_uint8());
  S* sums = kRounded ? room.data<S>() : grad_value.data<S>();
  gpu.clear(sums, static_cast<size_t>(number) * sizeof(S));
  if (grad.numel() != 0 && call.weights.numel() != 0) {
    const auto run = call.channels % N != 0       ? backward<T, S, 1, 32>
                     : call.channels / N <= 8 ? backward<T, S, N, 8>
                                              : backward<T, S, N, 16>;
    run(call, gpu, grad, bound, sums, grad_locations, grad_weights);
  }
  if (kRounded && number != 0) {
    const int64_t most = 1 << 20;
    const unsigned each = blocks(number, 256);
    gpu.launch(&deformable_round<T, S>, each < most ? each : static_cast<unsigned>(most), 256, 0,
               sums, bound, grad_value.data<T>(), static_cast<Int64>(number));
  }
}

// deformable_attention_backward(grad, value, shapes, locations, weights, bound) -> three gradients
void backward_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad(stack[0]), bound(stack[5]);
  const Call call(stack + 1);
  const Gpu gpu(call.value);
  require(gpu.holds(call.locations) && gpu.holds(call.weights) && gpu.holds(grad) &&
              (bound.numel() == 0 || gpu.holds(bound)),
          kApart);
  require(grad.contiguous() && grad.dtype() == call.value.dtype() &&
              grad.is({call.batch(), call.queries, int64_t{call.heads} * call.channels}),
          "the gradient must be (B, Q, M * D)");
  Tensor grad_value = Tensor::empty_like(call.value);
  Tensor grad_locations = Tensor::empty_like(call.locations);
  Tensor grad_weights = Tensor::empty_like(call.weights);
  for_type(call.value, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    require_type<Sum<T>>(call);
    if (bound.numel() == 0) {
      return backward_of<T, Sum<T>>(call, gpu, grad, nullptr, grad_value, grad_locations,
                                    grad_weights);
    }
    require(bound.numel() == 1 && bound.dtype() == call.weights.dtype(),
            "the bound must be one number of the weights' type");
    backward_of<T, Int64>(call, gpu, grad, bound.data<const Sum<T>>(), grad_value, grad_locations,
                          grad_weights);
  });
  stack[0] = grad_value.release();
  stack[1] = grad_locations.release();
  stack[2] = grad_weights.release();
}

[[maybe_unused]] const bool registered =
    register_kernels(kKey, {{"deformable_attention", forward_kernel},
                            {"deformable_attention_backward", backward_kernel}});

}  // namespace
}  // namespace pmvis

#define PMVIS_PUBLIC extern "C" __attribute__((visibility("default")))

// The version of the schemas that the kernels were written for; 0: torch refused them.
PMVIS_PUBLIC int pmvis_cuda_schemas() { return pmvis::refused() ? 0 : pmvis::kSchemas; }
