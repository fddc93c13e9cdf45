// The CPU kernels of the affinity and of the pairwise loss of clips on torch's stable ABI.
#include <vector>

#include "ops/clip_pairwise/kernels.h"
#include "ops/clip_pairwise/operands.h"
#include "ops/common/isa.h"
#include "ops/common/tasks.h"
#include "ops/pairwise/linear_light.h"

namespace pmvis {
namespace {

// lab_means(images, stride, block) -> means
void means_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const LabMeanOperands call(stack);
  const LabMeans means{call.images.data<const uint8_t>(), linear_light(), call.images.size(2),
                       call.images.size(3), call.stride, call.block};
  Tensor output = Tensor::empty({call.images.size(0), 3, means.rows(), means.columns()},
                                aoti_torch_dtype_float32());
  for_each_task(call.images.size(0) * means.rows(), means.scratch() * 4,
                [&](int64_t task, char* scratch) {
                  PMVIS_BEST_ISA(lab_means(means, task / means.rows(), task % means.rows(),
                                           reinterpret_cast<float*>(scratch),
                                           output.data<float>()));
                });
  stack[0] = output.release();
}

// A shift beyond this is one beyond every map.
void require_shifts(const Tensor& shifts, const Requirement& require) {
  const int64_t* values = shifts.data<const int64_t>();
  for (int64_t at = 0; at < shifts.numel(); ++at) {
    require(values[at] >= INT32_MIN && values[at] <= INT32_MAX, "a shift is too large");
  }
}

ClipSteps steps_of(const Tensor& steps, const Tensor& shifts, int64_t frames, int64_t height,
                   int64_t width) {
  return {steps.data<const int64_t>(), shifts.data<const int64_t>(), steps.size(0), frames, height,
          width};
}

void require_places(const ClipColourOperands& call) {
  const Requirement& require = ClipColourOperands::require;
  for (int64_t n = 0; n < call.number(); ++n) {
    const int64_t clip = call.video.data<const int64_t>()[n];
    require(clip >= 0 && clip < call.colours.size(0), "a video index is out of range");
  }
  for (int64_t at = 0; at < call.cells.numel(); at += 4) {
    const int64_t* box = call.cells.data<const int64_t>() + at;
    for (int64_t d = 0; d < 4; ++d) {
      require(box[d] >= 0 && box[d] <= call.colours.size(d % 2 == 0 ? 4 : 3),
              "cells reach beyond the map");
    }
  }
  require_shifts(call.shifts, require);
}

void pairs_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const ClipColourOperands call(stack);
  require_places(call);
  const int64_t frames = call.colours.size(1), height = call.colours.size(3);
  const int64_t width = call.colours.size(4);
  const bool patches = call.with_patches();
  const ClipColours clips{steps_of(call.steps, call.shifts, frames, height, width),
                          call.colours.data<const float>(),
                          patches ? call.patches.data<const float>() : nullptr,
                          call.video.data<const int64_t>(),
                          call.cells.data<const int64_t>(),
                          patches ? call.patches.size(2) : 0,
                          patches ? call.patches.size(3) : 0,
                          patches ? call.patches.size(4) : 0,
                          call.threshold,
                          call.patch_weight};
  Tensor output =
      Tensor::empty({call.number(), frames, height, width}, aoti_torch_dtype_int16());
  if (output.numel() != 0) {
    for_each_task(call.number() * frames, width * 4, [&](int64_t task, char* scratch) {
      PMVIS_BEST_ISA(clip_pairs(clips, task / frames, task % frames,
                                reinterpret_cast<float*>(scratch),
                                output.data<uint16_t>() + task * height * width));
    });
  }
  stack[0] = output.release();
}

template <typename T>
void run(const ClipPairOperands& call, const PairResults& results) {
  const Tensor& logits = call.logits;
  const ClipPairs<T> clips{
      steps_of(call.steps, call.shifts, logits.size(1), logits.size(2), logits.size(3)),
      logits.data<const T>(), call.pairs.data<const uint16_t>(), results.slopes<T>()};
  for_each_task(call.number(), clips.scratch(), [&](int64_t n, char* scratch) {
    double term = 0;
    int64_t number = 0;
    PMVIS_BEST_ISA(clip_pairwise(clips, n, scratch, &term, &number));
    results.terms.data<T>()[n] = static_cast<T>(term);
    results.edges.data<T>()[n] = static_cast<T>(number);
  });
}

void terms_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const ClipPairOperands call(stack);
  require_shifts(call.shifts, ClipPairOperands::require);
  PairResults results(call.logits, call.with_gradient);
  (call.single() ? run<float> : run<double>)(call, results);
  results.release(stack);
}

[[maybe_unused]] const bool registered =
    register_kernels("CPU", {{"lab_means", means_kernel},
                             {"clip_pairs", pairs_kernel},
                             {"clip_terms", terms_kernel}});

}  // namespace
}  // namespace pmvis
