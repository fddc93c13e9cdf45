// Colour affinity and the pairwise loss on the GPU, on torch's stable ABI; the kernels are in
// kernels.cuh.
#include "ops/pairwise/kernels.cuh"

#include "ops/pairwise/tiles.h"

namespace pmvis {
namespace {

constexpr int64_t kMaxSide = 1 << 20;

// lab_similarity(images, kernel, dilation) -> similarity
void similarity_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const ColourOperands call(stack, kMaxSide, kMaxColourReach);
  const Tensor& images = call.images;
  const int64_t kernel = call.kernel, dilation = call.dilation;
  const int64_t batch = images.size(0), height = images.size(2), width = images.size(3);
  ColourOperands::require(batch <= kMaxGrid, "images are too many");
  const Gpu gpu(images);
  Tensor output = gpu.empty({batch, kernel * kernel - 1, height, width},
                            aoti_torch_dtype_float32());
  if (output.numel() != 0) {
    const int64_t reach = kernel / 2 * dilation;
    const int64_t cells = (kTileWidth + 2 * reach) * (kColourRows + 2 * reach);
    gpu.launch(&lab_similarity, tiles(height, width, batch, kColourRows), kTileThreads,
               static_cast<size_t>(12 * cells), images.data<const unsigned char>(),
               output.data<float>(), static_cast<int>(height), static_cast<int>(width),
               static_cast<int>(kernel / 2), static_cast<int>(dilation));
  }
  stack[0] = output.release();
}

constexpr Requirement require = PairOperands::require;

template <typename T>
void run(const Gpu& gpu, const PairOperands& call, const PairResults& results) {
  const int64_t number = call.number(), images = call.similarity.size(0);
  const int height = static_cast<int>(call.logits.size(1));
  const int width = static_cast<int>(call.logits.size(2));
  const int dilation = static_cast<int>(call.dilation);
  const Tensor asks = gpu.empty({images, height, width}, aoti_torch_dtype_uint8());
  if (asks.numel() != 0) {
    gpu.launch(&asked_neighbours, tiles(height, width, images), kTileThreads, 0,
               call.similarity.data<const float>(),
               call.valid.numel() != 0 ? call.valid.data<const unsigned char>() : nullptr,
               asks.data<unsigned char>(), call.threshold, height, width, dilation);
  }
  if (number == 0) return;
  const dim3 grid = tiles(height, width, number);
  const int64_t count = int64_t{grid.x} * grid.y;
  const TileSums sums(gpu, number, count);
  if (count != 0) {
    const size_t shared = sizeof(End<T>) * (kTileWidth + 2 * dilation) *
                          (kTileHeight + 2 * dilation);
    gpu.launch(&pairwise_tiles<T>, grid, kTileThreads, shared, call.logits.data<const T>(),
               asks.data<const unsigned char>(), call.image.data<const Int64>(),
               call.cells.data<const Int64>(), results.slopes<T>(), sums.terms(), sums.edges(),
               static_cast<int>(images), height, width, dilation);
  }
  sums.add_up<T>(gpu, results);
}

// An image index out of range gives no number: looking at it here would wait for the GPU.
void pairwise_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const PairOperands call(stack, kMaxSide);
  require(call.number() <= kMaxGrid && call.similarity.size(0) <= kMaxGrid,
          "instances or images are too many");
  require(call.dilation >= 1 && call.dilation <= kMaxPairDilation, "the dilation must be 1 to 8");
  const Gpu gpu(call.logits);
  require(gpu.holds(call.similarity) && gpu.holds(call.image) && gpu.holds(call.cells) &&
              (call.valid.numel() == 0 || gpu.holds(call.valid)),
          "tensors must be on one device");
  PairResults results(call.logits, call.with_gradient);
  (call.single() ? run<float> : run<double>)(gpu, call, results);
  results.release(stack);
}

[[maybe_unused]] const bool registered =
    register_kernels(kKey, {{"lab_similarity", similarity_kernel},
                            {"pairwise_terms", pairwise_kernel}});

}  // namespace
}  // namespace pmvis
