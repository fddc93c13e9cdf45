// The CPU kernel of local attention on torch's stable ABI.
#include <type_traits>

#include "ops/common/isa.h"
#include "ops/local_attention/kernels.h"
#include "ops/local_attention/operands.h"

namespace pmvis {
namespace {

constexpr Requirement require = WindowOperands::require;

// The kernels on numbers of T, with the room that they need.
template <typename T>
class Run {
 public:
  explicit Run(const WindowOperands& call)
      : windows_{call.batch(), call.height, call.width, call.side}, dtype_(call.value.dtype()) {}

  // Products of `query` with the windows of `map`, as WindowScores has them.
  void scores(const Tensor& query, const Tensor& map, const T* terms, const T* weights,
              T* output) const {
    const int64_t channels = map.size(2), rows = windows_.batch * windows_.height;
    const Tensor room = Tensor::empty({rows * channels * pitch_of<T>(windows_)}, dtype_);
    T* const turned = room.data<T>();
    each(rows, windows_.width * channels, [&](int64_t begin, int64_t end) {
      PMVIS_BEST_ISA(turn_rows(windows_, map.data<const T>(), channels, turned, begin, end));
    });
    const WindowScores<T> call{query.data<const T>(), turned, channels, terms, weights, output};
    each(rows, windows_.width * windows_.area() * channels, [&](int64_t begin, int64_t end) {
      PMVIS_BEST_ISA(score_rows(windows_, call, begin, end));
    });
  }

  // Sums of `map` over windows, as WindowSums has them.
  void sums(const Tensor& map, const T* weights, bool gathers, T* output) const {
    const int64_t channels = map.size(2), parts = parts_of<T>(channels);
    const int64_t line = kWindowLanes<T>, cells = windows_.cells();
    const Tensor room = Tensor::empty({windows_.batch * parts * cells * line}, dtype_);
    T* const packed = room.data<T>();
    each(windows_.batch * parts, cells * line, [&](int64_t begin, int64_t end) {
      PMVIS_BEST_ISA(pack_parts(windows_, map.data<const T>(), channels, packed, begin, end));
    });
    const WindowSums<T> call{packed, channels, weights, gathers, output};
    const int64_t work = kWindowRows * windows_.width * windows_.area() * line;
    each(windows_.batch * windows_.bands() * parts, work, [&](int64_t begin, int64_t end) {
      PMVIS_BEST_ISA(sum_parts(windows_, call, begin, end));
    });
  }

 private:
  // Shares out items that cost `work` each.
  template <typename Body>
  static void each(int64_t items, int64_t work, const Body& body) {
    parallel_for(items, 1 + (1 << 16) / (1 + work), body);
  }

  Windows windows_;
  int32_t dtype_;
};

// Calls run(Run<T>, T*) for the operands' type.
template <typename Action>
void for_type(const WindowOperands& call, const Action& action) {
  if (call.value.dtype() == aoti_torch_dtype_float32()) {
    return action(Run<float>(call), static_cast<float*>(nullptr));
  }
  require(call.value.dtype() == aoti_torch_dtype_float64(), "only float32 and float64 are known");
  action(Run<double>(call), static_cast<double*>(nullptr));
}

// local_attention(query, key, value, bias, height, width) -> sums, weights
void forward_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor query(stack[0]), key(stack[1]), value(stack[2]), bias(stack[3]);
  const WindowOperands call(query, key, value, bias, static_cast<int64_t>(stack[4]),
                            static_cast<int64_t>(stack[5]), kMaxWindow);
  require(bias.dtype() == value.dtype(), "bias must be of value's type");
  Tensor sums = Tensor::empty_like(value), weights = Tensor::empty_like(bias);
  for_type(call, [&](const auto& run, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run.scores(query, key, bias.data<const T>(), nullptr, weights.data<T>());
    run.sums(value, weights.data<const T>(), false, sums.data<T>());
  });
  stack[0] = sums.release();
  stack[1] = weights.release();
}

// local_attention_backward(grad, grad_weights, query, key, value, weights, height, width) ->
// gradients of query, key, value and bias
void backward_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad(stack[0]), grad_weights(stack[1]), query(stack[2]), key(stack[3]),
      value(stack[4]), weights(stack[5]);
  const WindowOperands call(query, key, value, weights, static_cast<int64_t>(stack[6]),
                            static_cast<int64_t>(stack[7]), kMaxWindow);
  const bool two = grad_weights.numel() != 0;  // weights may be of no interest
  call.require_gradient(grad);
  if (two) call.require_windows(grad_weights);
  require(weights.dtype() == value.dtype() && grad_weights.dtype() == value.dtype(),
          "weights must be of value's type");
  Tensor grad_query = Tensor::empty_like(query), grad_key = Tensor::empty_like(key);
  Tensor grad_value = Tensor::empty_like(value), grad_bias = Tensor::empty_like(weights);
  for_type(call, [&](const auto& run, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* slopes = grad_bias.data<const T>();
    run.scores(grad, value, two ? grad_weights.data<const T>() : nullptr,
               weights.data<const T>(), grad_bias.data<T>());
    run.sums(key, slopes, false, grad_query.data<T>());
    run.sums(query, slopes, true, grad_key.data<T>());
    run.sums(grad, weights.data<const T>(), true, grad_value.data<T>());
  });
  stack[0] = grad_query.release();
  stack[1] = grad_key.release();
  stack[2] = grad_value.release();
  stack[3] = grad_bias.release();
}

[[maybe_unused]] const bool registered =
    register_kernels("CPU", {{"local_attention", forward_kernel},
                             {"local_attention_backward", backward_kernel}});

}  // namespace
}  // namespace pmvis
