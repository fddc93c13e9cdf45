// Deformable attention on the GPU, on torch's stable ABI; the kernels are in
// kernels.cuh. Locations and weights are float32 where the maps are of a half type.
#include "ops/deformable_attention/kernels.cuh"

#include <type_traits>

#include "ops/common/gpu.h"

namespace pmvis {
namespace {

constexpr Requirement require{"deformable_attention"};
constexpr const char* kApart = "tensors must be on one device";

// One call, checked. Places and scores are locations and weights or, with references, offsets and
// logits.
struct Call {
  const Tensor &value, &shapes, &places, &scores;
  const Tensor *references, *padding;
  Int64 level[kMaxLevels] = {};
  int levels, tokens, heads, channels, queries, points, size = 0;

  Call(const Tensor& value, const Tensor& shapes, const Tensor& places, const Tensor& scores,
       const Tensor* references = nullptr, const Tensor* padding = nullptr)
      : value(value), shapes(shapes), places(places), scores(scores), references(references),
        padding(padding) {
    require(value.dim() == 4 && places.dim() == 6 && shapes.dim() == 2,
            "value, shapes and locations must have 4, 2 and 6 dimensions");
    require(value.contiguous() && shapes.contiguous() && places.contiguous() &&
                scores.contiguous(),
            "tensors must be contiguous");
    levels = narrowed(places.size(3), kMaxLevels, "there are more than 8 levels");
    require(shapes.dtype() == aoti_torch_dtype_int64() && shapes.is({levels, 2}) && on_cpu(shapes),
            "shapes must be (L, 2) int64 on the CPU");
    const int64_t batch = value.size(0);
    require(places.is({batch, -1, value.size(2), levels, -1, 2}),
            "locations must be (B, Q, M, L, P, 2)");
    require(scores.is({batch, places.size(1), value.size(2), levels, places.size(4)}),
            "weights must be (B, Q, M, L, P)");
    tokens = narrowed(value.size(1), INT32_MAX, "there are too many tokens");
    heads = narrowed(value.size(2), kMaxGrid, "there are too many heads");
    channels = narrowed(value.size(3), 1 << 20, "there are too many channels");
    queries = narrowed(places.size(1), INT32_MAX / 2, "there are too many queries");
    points = narrowed(places.size(4), 1 << 16, "there are too many points");
    read_levels();
    if (references != nullptr) read_references();
  }
  int64_t batch() const { return value.size(0); }
  bool fused() const { return references != nullptr; }
  const unsigned char* hidden() const {
    return fused() && padding->numel() != 0 ? padding->data<const unsigned char>() : nullptr;
  }
  bool on(const Gpu& gpu) const {
    return gpu.holds(places) && gpu.holds(scores) &&
           (!fused() || (gpu.holds(*references) && (hidden() == nullptr || gpu.holds(*padding))));
  }
  template <typename A>
  const A* reference_data() const {
    return fused() ? references->data<const A>() : nullptr;
  }

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
  void read_references() {
    require(references->contiguous() && references->dtype() == places.dtype() &&
                references->is({batch(), queries, levels, -1}) &&
                (references->size(3) == 2 || references->size(3) == 4),
            "references must be (B, Q, L, 2 or 4) of the offsets' type");
    require(padding->contiguous() && padding->dtype() == aoti_torch_dtype_bool() &&
                (padding->numel() == 0 || padding->is({batch(), tokens})),
            "padding must be (B, S) bool, or empty");
    size = static_cast<int>(references->size(3));
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
  require(call.places.dtype() == dtype_of(kOf<A>) && call.scores.dtype() == dtype_of(kOf<A>),
          "locations and weights must be float32, or float64 as value");
}

// Elements of a vector load where the channels are whole vectors, else 1.
template <typename T, int BYTES>
constexpr int kVector = BYTES / static_cast<int>(sizeof(T));

template <typename T, int N, int G, bool F>
void forward(const Call& call, const Gpu& gpu, T* output) {
  using A = Sum<T>;
  const int slices = (call.channels + G * N - 1) / (G * N);
  const int64_t rows = call.batch() * call.heads * slices;
  require(rows <= kMaxGrid, "batch x heads are too many");
  const Int64* l = call.level;
  gpu.launch(&deformable_forward<T, N, G, F>,
             {blocks(call.queries, kThreads / G), static_cast<unsigned>(rows)}, kThreads, 0,
             call.value.data<const T>(), call.reference_data<A>(), call.places.data<const A>(),
             call.scores.data<const A>(), call.hidden(), output, l[0], l[1], l[2], l[3], l[4],
             l[5], l[6], l[7], call.levels, call.tokens, call.heads, call.channels, call.queries,
             call.points, call.size);
}

template <typename T, bool F>
void forward_with(const Call& call, const Gpu& gpu, T* output) {
  constexpr int N = kVector<T, 16>;
  if (call.channels % N != 0) return forward<T, 1, 32, F>(call, gpu, output);
  const int vectors = call.channels / N;
  if (vectors <= 4) return forward<T, N, 4, F>(call, gpu, output);
  if (vectors <= 8) return forward<T, N, 8, F>(call, gpu, output);
  forward<T, N, 16, F>(call, gpu, output);
}

Tensor forward_of(const Call& call) {
  const Gpu gpu(call.value);
  require(call.on(gpu), kApart);
  Tensor output = gpu.empty({call.batch(), call.queries, int64_t{call.heads} * call.channels},
                            call.value.dtype());
  for_type(call.value, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    require_type<Sum<T>>(call);
    if (output.numel() == 0) return;
    if (call.fused()) return forward_with<T, true>(call, gpu, output.data<T>());
    forward_with<T, false>(call, gpu, output.data<T>());
  });
  return output;
}

// Gradients like the operands, and (B, Q, M, L, R) for the references, or nothing.
struct Results {
  Tensor value, references, places, scores;
};

template <typename T, typename S, int N, int G, bool F>
void backward(const Call& call, const Gpu& gpu, const Tensor& grad, const Sum<T>* bound, S* sums,
              const Results& results) {
  using A = Sum<T>;
  const int64_t rows = call.batch() * call.heads;
  require(rows <= kMaxGrid, "batch x heads are too many");
  const Int64* l = call.level;
  gpu.launch(&deformable_backward<T, S, N, G, F>,
             {blocks(call.queries, kQueries * (kThreads / G)), static_cast<unsigned>(rows)},
             kThreads, 0, grad.data<const T>(), call.value.data<const T>(),
             call.reference_data<A>(), call.places.data<const A>(), call.scores.data<const A>(),
             call.hidden(), bound, sums,
             results.references.numel() == 0 ? nullptr : results.references.data<A>(),
             results.places.data<A>(), results.scores.data<A>(), l[0], l[1], l[2], l[3], l[4],
             l[5], l[6], l[7], call.levels, call.tokens, call.heads, call.channels, call.queries,
             call.points, call.size);
}

// Sums of value's gradient (as S, rounded to T after) and the other gradients.
template <typename T, typename S, bool F>
void backward_with(const Call& call, const Gpu& gpu, const Tensor& grad, const Sum<T>* bound,
                   const Results& results) {
  constexpr int N = 16 / static_cast<int>(sizeof(Sum<T>));
  constexpr bool kRounded = !std::is_same_v<S, T>;
  const int64_t number = call.value.numel();
  const Tensor room = gpu.empty({kRounded ? number * int64_t{sizeof(S)} : 0},
                                aoti_torch_dtype_uint8());
  S* sums = kRounded ? room.data<S>() : results.value.data<S>();
  gpu.clear(sums, static_cast<size_t>(number) * sizeof(S));
  if (grad.numel() != 0 && call.scores.numel() != 0) {
    const auto run = call.channels % N != 0       ? backward<T, S, 1, 32, F>
                     : call.channels / N <= 8 ? backward<T, S, N, 8, F>
                                              : backward<T, S, N, 16, F>;
    run(call, gpu, grad, bound, sums, results);
  } else {
    for (const Tensor* none : {&results.references, &results.places, &results.scores}) {
      gpu.clear(none->data<void>(), static_cast<size_t>(none->numel()) * sizeof(Sum<T>));
    }
  }
  if (kRounded && number != 0) {
    const int64_t most = 1 << 20;
    const unsigned each = blocks(number, 256);
    gpu.launch(&deformable_round<T, S>, each < most ? each : static_cast<unsigned>(most), 256, 0,
               sums, bound, results.value.data<T>(), static_cast<Int64>(number));
  }
}

template <typename T, bool F>
void backward_in(const Call& call, const Gpu& gpu, const Tensor& grad, const Tensor& bound,
                 const Results& results) {
  if (bound.numel() == 0) {
    return backward_with<T, Sum<T>, F>(call, gpu, grad, nullptr, results);
  }
  require(bound.numel() == 1 && bound.dtype() == call.scores.dtype(),
          "the bound must be one number of the weights' type");
  backward_with<T, Int64, F>(call, gpu, grad, bound.data<const Sum<T>>(), results);
}

Results backward_of(const Call& call, const Tensor& grad, const Tensor& bound,
                    bool with_references) {
  const Gpu gpu(call.value);
  require(call.on(gpu) && gpu.holds(grad) && (bound.numel() == 0 || gpu.holds(bound)), kApart);
  require(grad.contiguous() && grad.dtype() == call.value.dtype() &&
              grad.is({call.batch(), call.queries, int64_t{call.heads} * call.channels}),
          "the gradient must be (B, Q, M * D)");
  const int32_t wide = call.scores.dtype();
  Results results{Tensor::empty_like(call.value),
                  with_references ? gpu.empty({call.batch(), call.queries, call.heads, call.levels,
                                               call.size},
                                              wide)
                                  : gpu.empty({0}, wide),
                  Tensor::empty_like(call.places), Tensor::empty_like(call.scores)};
  for_type(call.value, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    require_type<Sum<T>>(call);
    if (call.fused()) return backward_in<T, true>(call, gpu, grad, bound, results);
    backward_in<T, false>(call, gpu, grad, bound, results);
  });
  return results;
}

// deformable_attention(value, shapes, locations, weights) -> output
void forward_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor value(stack[0]), shapes(stack[1]), locations(stack[2]), weights(stack[3]);
  stack[0] = forward_of(Call(value, shapes, locations, weights)).release();
}

// deformable_attention_backward(grad, value, shapes, locations, weights, bound) -> three gradients
void backward_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad(stack[0]), value(stack[1]), shapes(stack[2]), locations(stack[3]),
      weights(stack[4]), bound(stack[5]);
  Results results = backward_of(Call(value, shapes, locations, weights), grad, bound, false);
  stack[0] = results.value.release();
  stack[1] = results.places.release();
  stack[2] = results.scores.release();
}

// fused_deformable_attention(value, shapes, references, offsets, logits, padding) -> output
void fused_forward_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor value(stack[0]), shapes(stack[1]), references(stack[2]), offsets(stack[3]),
      logits(stack[4]), padding(stack[5]);
  stack[0] = forward_of(Call(value, shapes, offsets, logits, &references, &padding)).release();
}

// fused_deformable_attention_backward(grad, value, shapes, references, offsets, logits, padding,
// bound, with_references) -> gradients of value, references (a head's each), offsets, logits
void fused_backward_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad(stack[0]), value(stack[1]), shapes(stack[2]), references(stack[3]),
      offsets(stack[4]), logits(stack[5]), padding(stack[6]), bound(stack[7]);
  const Call call(value, shapes, offsets, logits, &references, &padding);
  Results results = backward_of(call, grad, bound, flag(stack[8]));
  stack[0] = results.value.release();
  stack[1] = results.references.release();
  stack[2] = results.places.release();
  stack[3] = results.scores.release();
}

[[maybe_unused]] const bool registered =
    register_kernels(kKey, {{"deformable_attention", forward_kernel},
                            {"deformable_attention_backward", backward_kernel},
                            {"fused_deformable_attention", fused_forward_kernel},
                            {"fused_deformable_attention_backward", fused_backward_kernel}});

}  // namespace
}  // namespace pmvis
