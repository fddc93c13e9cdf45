// Runs and stacks of masks on the GPU, on torch's stable ABI; the kernels are in runs.cuh and
// stacks.cuh.
#include "ops/mask_runs/runs.cuh"
#include "ops/mask_runs/stacks.cuh"

#include "ops/common/gpu.h"

namespace pmvis {
namespace {

int64_t strips_of(int64_t height) { return (height + kStrip - 1) / kStrip; }

// Words of masks: blocks of 32 columns and of kStripsOfBlock strips.
dim3 word_grid(int64_t masks, int64_t height, int64_t width) {
  return {blocks(width, 32), blocks(strips_of(height), kStripsOfBlock),
          static_cast<unsigned>(masks)};
}

void require_countable(int64_t masks, int64_t height, int64_t width, const Requirement& require) {
  require(height > 0 && width > 0 && height <= INT32_MAX / width && masks <= kMaxGrid &&
              strips_of(height) <= kMaxGrid * kStripsOfBlock,
          "the masks are too large or too many");
}

// mask_events(logits, rows, columns, height, width, threshold, changes) -> words, counts
void events_kernel(StableIValue* stack, uint64_t, uint64_t) {
  constexpr Requirement require{"mask_events"};
  const Tensor logits(stack[0]), rows(stack[1]), columns(stack[2]);
  const int64_t full_height = static_cast<int64_t>(stack[3]);
  const int64_t full_width = static_cast<int64_t>(stack[4]);
  const float threshold = static_cast<float>(number(stack[5]));
  const int changes = flag(stack[6]) ? 1 : 0;
  require(logits.dtype() == aoti_torch_dtype_float32() && logits.contiguous() &&
              logits.dim() == 3 && logits.size(1) > 0 && logits.size(2) > 0 &&
              logits.size(1) <= INT32_MAX / logits.size(2),
          "logits must be (N, h, w) float32, contiguous, with pixels");
  const bool picked = rows.numel() != 0;
  require(rows.dtype() == aoti_torch_dtype_int32() && columns.dtype() == rows.dtype() &&
              rows.contiguous() && columns.contiguous() && rows.dim() == 1 &&
              columns.dim() == 1 && picked == (columns.numel() != 0),
          "rows and columns must be (H,) and (W,) int32, or both (0,)");
  const int64_t height = picked ? rows.size(0) : full_height;
  const int64_t width = picked ? columns.size(0) : full_width;
  require_countable(logits.size(0), full_height, full_width, require);
  require_countable(logits.size(0), height, width, require);
  const Gpu gpu(logits);
  require(!picked || (gpu.holds(rows) && gpu.holds(columns)), "tensors must be on one device");
  const int64_t masks = logits.size(0), strips = strips_of(height);
  Tensor words = gpu.empty({masks, width, strips}, aoti_torch_dtype_int32());
  Tensor counts = gpu.empty({masks, width, strips}, aoti_torch_dtype_int32());
  if (words.numel() != 0) {
    gpu.launch(&mask_events, word_grid(masks, height, width), dim3(32, kStripsOfBlock), 0,
               logits.data<const float>(), picked ? rows.data<const int>() : nullptr,
               picked ? columns.data<const int>() : nullptr, words.data<int>(),
               counts.data<int>(), static_cast<int>(logits.size(1)),
               static_cast<int>(logits.size(2)), static_cast<int>(height),
               static_cast<int>(width),
               static_cast<float>(logits.size(1)) / static_cast<float>(full_height),
               static_cast<float>(logits.size(2)) / static_cast<float>(full_width), threshold,
               changes);
  }
  stack[0] = words.release();
  stack[1] = counts.release();
}

// mask_pack(masks) -> words
void pack_kernel(StableIValue* stack, uint64_t, uint64_t) {
  constexpr Requirement require{"mask_pack"};
  const Tensor masks(stack[0]);
  require(masks.dtype() == aoti_torch_dtype_bool() && masks.contiguous() && masks.dim() == 3,
          "masks must be (N, H, W) bool, contiguous");
  const int64_t height = masks.size(1), width = masks.size(2);
  require_countable(masks.size(0), height, width, require);
  const Gpu gpu(masks);
  Tensor words =
      gpu.empty({masks.size(0), width, strips_of(height)}, aoti_torch_dtype_int32());
  if (words.numel() != 0) {
    gpu.launch(&mask_pack, word_grid(masks.size(0), height, width), dim3(32, kStripsOfBlock), 0,
               masks.data<const unsigned char>(), words.data<int>(), static_cast<int>(height),
               static_cast<int>(width));
  }
  stack[0] = words.release();
}

void require_words(const Tensor& words, const Requirement& require) {
  require(words.dtype() == aoti_torch_dtype_int32() && words.contiguous() && words.dim() == 3 &&
              words.size(1) * words.size(2) <= INT32_MAX / kStrip,
          "words must be (N, W, strips) int32, contiguous");
}

// mask_extents(words) -> extents
void extents_kernel(StableIValue* stack, uint64_t, uint64_t) {
  constexpr Requirement require{"mask_extents"};
  const Tensor words(stack[0]);
  require_words(words, require);
  const Gpu gpu(words);
  Tensor extents = gpu.empty({words.size(0), 5}, aoti_torch_dtype_int64());
  if (extents.numel() != 0) {
    gpu.launch(&mask_extents, dim3(static_cast<unsigned>(words.size(0))), kFold, 0,
               words.data<const int>(), extents.data<Int64>(), static_cast<int>(words.size(2)),
               static_cast<int>(words.size(1)));
  }
  stack[0] = extents.release();
}

// mask_overlaps(words, others) -> overlaps
void overlaps_kernel(StableIValue* stack, uint64_t, uint64_t) {
  constexpr Requirement require{"mask_overlaps"};
  const Tensor words(stack[0]), others(stack[1]);
  require_words(words, require);
  require_words(others, require);
  require(words.size(1) == others.size(1) && words.size(2) == others.size(2) &&
              words.size(0) <= kMaxGrid,
          "the masks are too many, or of different sizes");
  const Gpu gpu(words);
  require(gpu.holds(others), "tensors must be on one device");
  Tensor overlaps = gpu.empty({words.size(0), others.size(0)}, aoti_torch_dtype_int64());
  if (overlaps.numel() != 0) {
    gpu.launch(&mask_overlaps,
               dim3(static_cast<unsigned>(others.size(0)), static_cast<unsigned>(words.size(0))),
               kFold, 0, words.data<const int>(), others.data<const int>(),
               overlaps.data<Int64>(), static_cast<int>(words.size(1) * words.size(2)));
  }
  stack[0] = overlaps.release();
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
    kKey, {{"mask_events", events_kernel},
           {"mask_extents", extents_kernel},
           {"mask_overlaps", overlaps_kernel},
           {"mask_pack", pack_kernel},
           {"mask_places", places_kernel}});

}  // namespace
}  // namespace pmvis
