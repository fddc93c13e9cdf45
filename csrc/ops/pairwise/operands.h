// The operands of the pairwise loss, read from the stack and checked; for CPU and GPU alike.
#pragma once

#include "ops/common/stable_tensor.h"

namespace pmvis {

// RGB bytes, which every kernel of colours reads.
inline void require_images(const Tensor& images, const Requirement& require) {
  require(images.dtype() == aoti_torch_dtype_uint8() && images.contiguous() &&
              images.is({-1, 3, -1, -1}),
          "images must be (B, 3, H, W) uint8, contiguous");
}

// lab_similarity(images, kernel, dilation) -> similarity
struct ColourOperands {
  static constexpr Requirement require{"lab_similarity"};

  Tensor images;
  int64_t kernel, dilation;

  ColourOperands(StableIValue* stack, int64_t largest_side, int64_t largest_reach)
      : images(stack[0]), kernel(static_cast<int64_t>(stack[1])),
        dilation(static_cast<int64_t>(stack[2])) {
    require_images(images, require);
    require(kernel >= 3 && kernel % 2 == 1 && dilation >= 1 && kernel <= 64 && dilation <= 64 &&
                kernel / 2 * dilation <= largest_reach,
            "the kernel must be odd and at least 3, the dilation positive, both small");
    require(images.size(2) <= largest_side && images.size(3) <= largest_side,
            "images are too large");
  }
};

// pairwise_terms(logits, similarity, image_index, cells, valid, threshold, dilation, with_gradient)
//     -> terms, edges, gradient
struct PairOperands {
  static constexpr Requirement require{"pairwise_terms"};

  Tensor logits, similarity, image, cells, valid;
  float threshold;
  int64_t dilation;
  bool with_gradient;

  PairOperands(StableIValue* stack, int64_t largest_side)
      : logits(stack[0]), similarity(stack[1]), image(stack[2]), cells(stack[3]), valid(stack[4]),
        threshold(static_cast<float>(pmvis::number(stack[5]))),
        dilation(static_cast<int64_t>(stack[6])), with_gradient(flag(stack[7])) {
    require(logits.dim() == 3 && logits.contiguous(), "logits must be (N, H, W), contiguous");
    const int64_t height = logits.size(1), width = logits.size(2);
    require(height <= largest_side && width <= largest_side, "the map is too large");
    require(similarity.dtype() == aoti_torch_dtype_float32() && similarity.contiguous() &&
                similarity.is({-1, 8, height, width}),
            "similarity must be (B, 8, H, W) float32, contiguous");
    require(image.dtype() == aoti_torch_dtype_int64() && image.contiguous() &&
                image.is({number()}),
            "image indices must be (N,) int64");
    require(cells.dtype() == aoti_torch_dtype_int64() && cells.contiguous() &&
                cells.is({number(), 4}),
            "cells must be (N, 4) int64");
    require(valid.dtype() == aoti_torch_dtype_bool() && valid.contiguous() &&
                (valid.is({0}) || valid.is({similarity.size(0), height, width})),
            "valid must be (B, H, W) bool, or (0,)");
    require(single() || logits.dtype() == aoti_torch_dtype_float64(),
            "only float32 and float64 are known");
  }
  int64_t number() const { return logits.size(0); }
  bool single() const { return logits.dtype() == aoti_torch_dtype_float32(); }
};

// What the losses of images and of clips return, where the logits are: for each instance the sum of
// its terms and their number, (N,) both, and the slopes of the terms, like the logits, or (0,).
struct PairResults {
  Tensor terms, edges, gradient;

  PairResults(const Tensor& logits, bool with_gradient)
      : terms(numbers(logits, logits.size(0))), edges(numbers(logits, logits.size(0))),
        gradient(with_gradient ? Tensor::empty_like(logits) : numbers(logits, 0)),
        with_gradient_(with_gradient) {}

  // Null where it is not wanted.
  template <typename T>
  T* slopes() const {
    return with_gradient_ ? gradient.data<T>() : nullptr;
  }
  void release(StableIValue* stack) {
    stack[0] = terms.release();
    stack[1] = edges.release();
    stack[2] = gradient.release();
  }

 private:
  static Tensor numbers(const Tensor& logits, int64_t number) {
    int32_t device = 0, index = 0;
    logits.where(&device, &index);
    return Tensor::empty({number}, logits.dtype(), device, index);
  }

  bool with_gradient_;
};

}  // namespace pmvis
