// The operands of the affinity and of the pairwise loss of clips, read from the stack and checked; for
// CPU and GPU alike.
#pragma once

#include "ops/pairwise/operands.h"

namespace pmvis {

constexpr int64_t kMaxClipSide = 1 << 20;  // of a map
constexpr int64_t kMaxClipSteps = 15;      // neighbours: bits of an int16 without its sign
constexpr int64_t kMaxClipStep = 1 << 10;  // rows or columns to a neighbour

// lab_means(images, stride, block) -> means
struct LabMeanOperands {
  static constexpr Requirement require{"lab_means"};

  Tensor images;
  int64_t stride, block;

  explicit LabMeanOperands(StableIValue* stack)
      : images(stack[0]), stride(static_cast<int64_t>(stack[1])),
        block(static_cast<int64_t>(stack[2])) {
    require_images(images, require);
    require(block >= 1 && block <= stride && stride <= 64, "1 <= block <= stride <= 64 must hold");
    require(images.size(2) >= block && images.size(3) >= block &&
                images.size(2) <= kMaxClipSide && images.size(3) <= kMaxClipSide,
            "images are too small or too large");
  }
};

// (K, 3) int64 on the CPU: frames, rows and columns to each neighbour.
inline void require_steps(const Tensor& steps, const Requirement& require) {
  int32_t device = 0, index = 0;
  steps.where(&device, &index);
  require(device == aoti_torch_device_type_cpu() && steps.dtype() == aoti_torch_dtype_int64() &&
              steps.contiguous() && steps.is({-1, 3}) && steps.size(0) <= kMaxClipSteps,
          "steps must be (K, 3) int64 on the CPU, of at most 15 neighbours");
  const int64_t* step = steps.data<const int64_t>();
  for (int64_t k = 0; k < steps.size(0); ++k, step += 3) {
    require((step[0] == 0 || step[0] == 1) && step[1] >= -kMaxClipStep &&
                step[1] <= kMaxClipStep && step[2] >= -kMaxClipStep && step[2] <= kMaxClipStep,
            "a step is no frame or one, and rows and columns within 1024");
  }
}

// clip_pairs(colours, patches, video_index, cells, shifts, steps, threshold, patch_weight) -> pairs
struct ClipColourOperands {
  static constexpr Requirement require{"clip_pairs"};

  Tensor colours, patches, video, cells, shifts, steps;
  float threshold, patch_weight;

  explicit ClipColourOperands(StableIValue* stack)
      : colours(stack[0]), patches(stack[1]), video(stack[2]), cells(stack[3]), shifts(stack[4]),
        steps(stack[5]), threshold(static_cast<float>(pmvis::number(stack[6]))),
        patch_weight(static_cast<float>(pmvis::number(stack[7]))) {
    require(colours.dtype() == aoti_torch_dtype_float32() && colours.contiguous() &&
                colours.is({-1, -1, 3, -1, -1}),
            "colours must be (B, T, 3, H, W) float32, contiguous");
    const int64_t frames = colours.size(1), height = colours.size(3), width = colours.size(4);
    require(height <= kMaxClipSide && width <= kMaxClipSide && frames <= kMaxClipSide,
            "the clips are too large");
    require(patches.dtype() == aoti_torch_dtype_float32() && patches.contiguous() &&
                (patches.is({0}) || (patches.is({colours.size(0), frames, -1, -1, -1}) &&
                                     (patches.size(2) + 1) / 2 == height &&
                                     (patches.size(3) + 1) / 2 == width)),
            "patches must be (B, T, 2 H or 2 H - 1, 2 W or 2 W - 1, C) float32, or (0,)");
    require(video.dtype() == aoti_torch_dtype_int64() && video.contiguous() && video.dim() == 1,
            "video indices must be (N,) int64");
    require(cells.dtype() == aoti_torch_dtype_int64() && cells.contiguous() &&
                cells.is({number(), frames, 4}),
            "cells must be (N, T, 4) int64");
    require(shifts.dtype() == aoti_torch_dtype_int64() && shifts.contiguous() &&
                shifts.is({number(), frames, 2}),
            "shifts must be (N, T, 2) int64");
    require_steps(steps, require);
  }
  int64_t number() const { return video.size(0); }
  bool with_patches() const { return patches.dim() == 5; }
};

// clip_terms(logits, pairs, shifts, steps, with_gradient) -> terms, edges, gradient
struct ClipPairOperands {
  static constexpr Requirement require{"clip_terms"};

  Tensor logits, pairs, shifts, steps;
  bool with_gradient;

  explicit ClipPairOperands(StableIValue* stack)
      : logits(stack[0]), pairs(stack[1]), shifts(stack[2]), steps(stack[3]),
        with_gradient(flag(stack[4])) {
    require(logits.dim() == 4 && logits.contiguous(), "logits must be (N, T, H, W), contiguous");
    require(logits.size(1) <= kMaxClipSide && logits.size(2) <= kMaxClipSide &&
                logits.size(3) <= kMaxClipSide,
            "the clips are too large");
    require(pairs.dtype() == aoti_torch_dtype_int16() && pairs.contiguous() &&
                pairs.is({number(), logits.size(1), logits.size(2), logits.size(3)}),
            "pairs must be int16, of the logits' shape");
    require(shifts.dtype() == aoti_torch_dtype_int64() && shifts.contiguous() &&
                shifts.is({number(), logits.size(1), 2}),
            "shifts must be (N, T, 2) int64");
    require_steps(steps, require);
    require(single() || logits.dtype() == aoti_torch_dtype_float64(),
            "only float32 and float64 are known");
  }
  int64_t number() const { return logits.size(0); }
  bool single() const { return logits.dtype() == aoti_torch_dtype_float32(); }
};

}  // namespace pmvis
