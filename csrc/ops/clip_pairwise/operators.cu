// Affinity and the pairwise loss of clips on the GPU, on torch's stable ABI; the kernels are in
// kernels.cuh.
#include "ops/clip_pairwise/kernels.cuh"

#include "ops/clip_pairwise/operands.h"
#include "ops/pairwise/tiles.h"

namespace pmvis {
namespace {

// The neighbours of a call, as kernels take them.
struct PackedSteps {
  Int64 packed[kMaxSteps / 2] = {};
  int number;

  explicit PackedSteps(const Tensor& steps) : number(static_cast<int>(steps.size(0))) {
    const int64_t* step = steps.data<const int64_t>();
    for (int k = 0; k < number; ++k, step += 3) {
      const Int64 bits = step[0] << 24 | (step[1] + kStepOffset) << 12 | (step[2] + kStepOffset);
      packed[k / 2] |= bits << (32 * (k % 2));
    }
  }
};

// lab_means(images, stride, block) -> means
void means_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const LabMeanOperands call(stack);
  const Tensor& images = call.images;
  const int64_t height = images.size(2), width = images.size(3);
  const int64_t rows = (height - call.block) / call.stride + 1;
  const int64_t columns = (width - call.block) / call.stride + 1;
  LabMeanOperands::require(images.size(0) <= kMaxGrid, "images are too many");
  const Gpu gpu(images);
  Tensor output = gpu.empty({images.size(0), 3, rows, columns}, aoti_torch_dtype_float32());
  if (output.numel() != 0) {
    gpu.launch(&lab_means, tiles(rows, columns, images.size(0)), kTileThreads, 0,
               images.data<const unsigned char>(), output.data<float>(), static_cast<int>(height),
               static_cast<int>(width), static_cast<int>(rows), static_cast<int>(columns),
               static_cast<int>(call.stride), static_cast<int>(call.block));
  }
  stack[0] = output.release();
}

void pairs_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const ClipColourOperands call(stack);
  const Requirement& require = ClipColourOperands::require;
  const int64_t videos = call.colours.size(0), frames = call.colours.size(1);
  const int64_t height = call.colours.size(3), width = call.colours.size(4);
  const bool patches = call.with_patches();
  require(call.number() * frames <= kMaxGrid && videos <= INT32_MAX,
          "instances x frames are too many");
  const Gpu gpu(call.colours);
  require(gpu.holds(call.video) && gpu.holds(call.cells) && gpu.holds(call.shifts) &&
              (!patches || gpu.holds(call.patches)),
          "tensors must be on one device");
  Tensor output = gpu.empty({call.number(), frames, height, width}, aoti_torch_dtype_int16());
  if (output.numel() != 0) {
    const PackedSteps steps(call.steps);
    const Int64* s = steps.packed;
    gpu.launch(&clip_pairs, tiles(height, width, call.number() * frames), kTileThreads, 0,
               call.colours.data<const float>(),
               patches ? call.patches.data<const float>() : nullptr,
               call.video.data<const Int64>(), call.cells.data<const Int64>(),
               call.shifts.data<const Int64>(), output.data<short>(), static_cast<int>(videos),
               static_cast<int>(frames), static_cast<int>(height), static_cast<int>(width),
               patches ? static_cast<int>(call.patches.size(2)) : 0,
               patches ? static_cast<int>(call.patches.size(3)) : 0,
               patches ? static_cast<int>(call.patches.size(4)) : 0, steps.number, call.threshold,
               call.patch_weight, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]);
  }
  stack[0] = output.release();
}

template <typename T>
void run(const Gpu& gpu, const ClipPairOperands& call, const PairResults& results) {
  const int64_t number = call.number(), frames = call.logits.size(1);
  const int height = static_cast<int>(call.logits.size(2));
  const int width = static_cast<int>(call.logits.size(3));
  if (number == 0) return;
  const dim3 grid = tiles(height, width, number * frames);
  const int64_t count = frames * grid.x * grid.y;
  const TileSums sums(gpu, number, count);
  const PackedSteps steps(call.steps);
  const Int64* s = steps.packed;
  if (count != 0) {
    gpu.launch(&clip_tiles<T>, grid, kTileThreads, 0, call.logits.data<const T>(),
               call.pairs.data<const short>(), call.shifts.data<const Int64>(),
               results.slopes<T>(), sums.terms(), sums.edges(), static_cast<int>(frames), height,
               width, steps.number, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]);
  }
  sums.add_up<T>(gpu, results);
}

void terms_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const ClipPairOperands call(stack);
  const Requirement& require = ClipPairOperands::require;
  require(call.number() * call.logits.size(1) <= kMaxGrid, "instances x frames are too many");
  const Gpu gpu(call.logits);
  require(gpu.holds(call.pairs) && gpu.holds(call.shifts), "tensors must be on one device");
  PairResults results(call.logits, call.with_gradient);
  (call.single() ? run<float> : run<double>)(gpu, call, results);
  results.release(stack);
}

[[maybe_unused]] const bool registered =
    register_kernels(kKey, {{"lab_means", means_kernel},
                            {"clip_pairs", pairs_kernel},
                            {"clip_terms", terms_kernel}});

}  // namespace
}  // namespace pmvis
