// The CPU kernels of deformable attention on torch's stable ABI. Schemas, gradients and shape functions
// of operators are in pmvis_core/ops.
#include <utility>

#include "ops/common/isa.h"
#include "ops/common/stable_tensor.h"
#include "ops/deformable_attention/kernels.h"

namespace pmvis {

namespace {

constexpr Requirement require{"deformable_attention"};

// Cells of a level along one axis: float32 must count them exactly.
constexpr int64_t kMaxSide = (1 << 24) - 1;

// The tensors of a call, checked; `references` is null without them, and so is `padding`.
struct Operands {
  const Tensor &value, &shapes, &places, &scores;
  const Tensor* references = nullptr;
  const Tensor* padding = nullptr;

  void check() const {
    require(value.dim() == 4 && places.dim() == 6 && scores.dim() == 5 && shapes.dim() == 2,
            "value, shapes, locations and weights must have 4, 2, 6 and 5 dimensions");
    require(shapes.dtype() == aoti_torch_dtype_int64() && shapes.size(1) == 2,
            "shapes must be (L, 2) int64");
    require(places.dtype() == value.dtype() && scores.dtype() == value.dtype(),
            "value, locations and weights must have one type");
    require(value.contiguous() && shapes.contiguous() && places.contiguous() &&
                scores.contiguous(),
            "tensors must be contiguous");
    require(places.is({value.size(0), -1, value.size(2), shapes.size(0), -1, 2}),
            "locations must be (B, Q, M, L, P, 2)");
    for (int64_t d = 0; d < 5; ++d) {
      require(scores.size(d) == places.size(d), "weights must be (B, Q, M, L, P)");
    }
    require(scores.size(3) * scores.size(4) <= kMaxPoints, "too many levels x points");
    check_levels();
    if (references != nullptr) check_references();
  }

 private:
  void check_levels() const {
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
  void check_references() const {
    require(references->contiguous() && references->dtype() == value.dtype() &&
                references->is({value.size(0), places.size(1), shapes.size(0), -1}) &&
                (references->size(3) == 2 || references->size(3) == 4),
            "references must be (B, Q, L, 2 or 4) of value's type");
    require(padding->contiguous() && padding->dtype() == aoti_torch_dtype_bool() &&
                (padding->numel() == 0 || padding->is({value.size(0), value.size(1)})),
            "padding must be (B, S) bool, or empty");
  }
};

// A call on numbers of T.
template <typename T>
class Run {
 public:
  explicit Run(const Operands& operands)
      : call_{operands.value.data<const T>(),
              operands.shapes.data<const int64_t>(),
              operands.references == nullptr ? nullptr : operands.references->data<const T>(),
              operands.places.data<const T>(),
              operands.scores.data<const T>(),
              operands.value.size(0),
              operands.value.size(1),
              operands.value.size(2),
              operands.value.size(3),
              operands.places.size(1),
              operands.places.size(3),
              operands.places.size(4),
              operands.references == nullptr ? 0 : operands.references->size(3),
              false},
        padding_(operands.padding == nullptr || operands.padding->numel() == 0
                     ? nullptr
                     : operands.padding->data<const uint8_t>()),
        dtype_(operands.value.dtype()),
        room_(Tensor::empty({packs() ? operands.value.numel() : 0}, dtype_)) {
    if (!packs()) return;
    copy(call_.value, room_.data<T>(), false);
    call_.value = room_.data<const T>();
    call_.packed = true;
  }

  void forward(T* output) const {
    const int64_t work = 1 + call_.levels * call_.points * call_.channels;
    parallel_for(call_.batch * call_.heads * call_.queries, 1 + (1 << 16) / work,
                 [&](int64_t begin, int64_t end) {
                   PMVIS_BEST_ISA(forward(call_, output, begin, end));
                 });
  }

  void backward(Gradients<T> gradients) const {
    const Tensor room = Tensor::empty({call_.packed ? room_.numel() : 0}, dtype_);
    T* const value = gradients.value;
    if (call_.packed) gradients.value = room.data<T>();
    parallel_for(call_.batch * call_.heads, 1, [&](int64_t begin, int64_t end) {
      PMVIS_BEST_ISA(backward(call_, gradients, begin, end));
    });
    if (call_.packed) copy(gradients.value, value, true);
  }

 private:
  // Whether each head's part of value is brought together first. A head that is read where it lies
  // is spread over all heads' memory, and fills no more than its share of a cache's sets. The copy
  // is also what hides padding.
  bool packs() const {
    const int64_t corners = 4 * call_.queries * call_.levels * call_.points;
    return padding_ != nullptr || (call_.heads > 1 && corners >= 8 * call_.tokens);
  }

  void copy(const T* from, T* to, bool unpacks) const {
    parallel_for(call_.batch * call_.tokens, 1 + (1 << 16) / (1 + call_.heads * call_.channels),
                 [&](int64_t begin, int64_t end) {
                   PMVIS_BEST_ISA(copy_tokens(call_, padding_, from, to, unpacks, begin, end));
                 });
  }

  Attention<T> call_;
  const uint8_t* padding_;
  int32_t dtype_;
  Tensor room_;
};

Tensor forward_of(const Operands& operands) {
  operands.check();
  const Tensor& value = operands.value;
  Tensor output = Tensor::empty(
      {value.size(0), operands.places.size(1), value.size(2) * value.size(3)}, value.dtype());
  if (value.dtype() == aoti_torch_dtype_float32()) {
    Run<float>(operands).forward(output.data<float>());
  } else {
    require(value.dtype() == aoti_torch_dtype_float64(), "only float32 and float64 are known");
    Run<double>(operands).forward(output.data<double>());
  }
  return output;
}

// Gradients like the operands, and (B, Q, M, L, R) for the references.
struct Results {
  Tensor value, references, places, scores;
};

template <typename T>
void backward_in(const Operands& operands, const Tensor& grad, const Results& results) {
  const Tensor& references = results.references;
  Run<T>(operands).backward({grad.data<const T>(), results.value.data<T>(),
                             references.numel() == 0 ? nullptr : references.data<T>(),
                             results.places.data<T>(), results.scores.data<T>()});
}

Results backward_of(const Operands& operands, const Tensor& grad, bool with_references) {
  operands.check();
  const Tensor &value = operands.value, &places = operands.places;
  require(grad.contiguous() && grad.dtype() == value.dtype() &&
              grad.is({value.size(0), places.size(1), value.size(2) * value.size(3)}),
          "the gradient must be (B, Q, M * D)");
  Tensor references =
      with_references
          ? Tensor::empty({value.size(0), places.size(1), value.size(2), places.size(3),
                           operands.references->size(3)},
                          value.dtype())
          : Tensor::empty({0}, value.dtype());
  Results results{Tensor::empty_like(value), std::move(references), Tensor::empty_like(places),
                  Tensor::empty_like(operands.scores)};
  if (value.dtype() == aoti_torch_dtype_float32()) {
    backward_in<float>(operands, grad, results);
  } else {
    require(value.dtype() == aoti_torch_dtype_float64(), "only float32 and float64 are known");
    backward_in<double>(operands, grad, results);
  }
  return results;
}

// deformable_attention(value, shapes, locations, weights) -> output
void forward_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor value(stack[0]), shapes(stack[1]), locations(stack[2]), weights(stack[3]);
  stack[0] = forward_of({value, shapes, locations, weights}).release();
}

// deformable_attention_backward(grad, value, shapes, locations, weights, bound) -> three gradients
void backward_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad(stack[0]), value(stack[1]), shapes(stack[2]), locations(stack[3]),
      weights(stack[4]), bound(stack[5]);  // the sums are in order anyway, so no bound is needed
  Results results = backward_of({value, shapes, locations, weights}, grad, false);
  stack[0] = results.value.release();
  stack[1] = results.places.release();
  stack[2] = results.scores.release();
}

// fused_deformable_attention(value, shapes, references, offsets, logits, padding) -> output
void fused_forward_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor value(stack[0]), shapes(stack[1]), references(stack[2]), offsets(stack[3]),
      logits(stack[4]), padding(stack[5]);
  stack[0] = forward_of({value, shapes, offsets, logits, &references, &padding}).release();
}

// fused_deformable_attention_backward(grad, value, shapes, references, offsets, logits, padding,
// bound, with_references) -> gradients of value, references (a head's each), offsets, logits
void fused_backward_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad(stack[0]), value(stack[1]), shapes(stack[2]), references(stack[3]),
      offsets(stack[4]), logits(stack[5]), padding(stack[6]), bound(stack[7]);
  Results results = backward_of({value, shapes, offsets, logits, &references, &padding}, grad,
                                flag(stack[8]));
  stack[0] = results.value.release();
  stack[1] = results.references.release();
  stack[2] = results.places.release();
  stack[3] = results.scores.release();
}

[[maybe_unused]] const bool registered =
    register_kernels("CPU", {{"deformable_attention", forward_kernel},
                             {"deformable_attention_backward", backward_kernel},
                             {"fused_deformable_attention", fused_forward_kernel},
                             {"fused_deformable_attention_backward", fused_backward_kernel}});

}  // namespace
}  // namespace pmvis
