// Runs of masks on the GPU, on torch's stable ABI; the kernels are in mask_runs.cuh.
#include "mask_runs.cuh"

#include "gpu.h"

namespace pmvis {
namespace {

int64_t strips_of(int64_t height) { return (height + kStrip - 1) / kStrip; }

// mask_events(logits, height, width, threshold) -> words, counts
void events_kernel(StableIValue* stack, uint64_t, uint64_t) {
  constexpr Requirement require{"mask_events"};
  const Tensor logits(stack[0]);
  const int64_t height = static_cast<int64_t>(stack[1]), width = static_cast<int64_t>(stack[2]);
  const float threshold = static_cast<float>(number(stack[3]));
  require(logits.dtype() == aoti_torch_dtype_float32() && logits.contiguous() &&
              logits.dim() == 3 && logits.size(1) > 0 && logits.size(2) > 0,
          "logits must be (N, h, w) float32, contiguous, with pixels");
  require(height > 0 && width > 0 && height <= INT32_MAX / width &&
              logits.size(1) <= INT32_MAX / logits.size(2) && logits.size(0) <= kMaxGrid &&
              strips_of(height) <= kMaxGrid * kStripsOfBlock,
          "the masks are too large or too many");
  const int64_t masks = logits.size(0), strips = strips_of(height);
  const Gpu gpu(logits);
  Tensor words = gpu.empty({masks, width, strips}, aoti_torch_dtype_int32());
  Tensor counts = gpu.empty({masks, width, strips}, aoti_torch_dtype_int32());
  if (words.numel() != 0) {
    gpu.launch(&mask_events,
               {blocks(width, 32), blocks(strips, kStripsOfBlock), static_cast<unsigned>(masks)},
               dim3(32, kStripsOfBlock), 0, logits.data<const float>(), words.data<int>(),
               counts.data<int>(), static_cast<int>(logits.size(1)),
               static_cast<int>(logits.size(2)), static_cast<int>(height),
               static_cast<int>(width),
               static_cast<float>(logits.size(1)) / static_cast<float>(height),
               static_cast<float>(logits.size(2)) / static_cast<float>(width), threshold);
  }
  stack[0] = words.release();
  stack[1] = counts.release();
}

// mask_places(words, starts, number, height) -> places
void places_kernel(StableIValue* stack, uint64_t, uint64_t) {
  constexpr Requirement require{"mask_places"};
  const Tensor words(stack[0]), starts(stack[1]);
  const int64_t number = static_cast<int64_t>(stack[2]), height = static_cast<int64_t>(stack[3]);
  require(words.dtype() == aoti_torch_dtype_int32() && words.contiguous() && words.dim() == 3 &&
              words.size(2) == strips_of(height),
          "words must be (N, W, strips) int32, contiguous");
  require(starts.dtype() == aoti_torch_dtype_int64() && starts.contiguous() &&
              starts.is({words.size(0), words.size(1), words.size(2)}),
          "starts must be int64, of the words' shape");
  require(number >= 0 && words.numel() <= int64_t{INT32_MAX} * 256, "there are too many words");
  const Gpu gpu(words);
  require(gpu.holds(starts), "tensors must be on one device");
  Tensor places = gpu.empty({number}, aoti_torch_dtype_int32());
  if (number != 0 && words.numel() != 0) {
    gpu.launch(&mask_places, dim3(blocks(words.numel(), 256)), 256, 0, words.data<const int>(),
               starts.data<const Int64>(), places.data<int>(),
               static_cast<Int64>(words.numel()), static_cast<int>(words.size(2)),
               static_cast<int>(words.size(1)), static_cast<int>(height));
  }
  stack[0] = places.release();
}

[[maybe_unused]] const bool registered = register_kernels(
    kKey, {{"mask_events", events_kernel}, {"mask_places", places_kernel}});

}  // namespace
}  // namespace pmvis
