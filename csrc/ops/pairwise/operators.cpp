// The CPU kernels of colour affinity and of the pairwise loss on torch's stable ABI.
#include <vector>

#include "ops/common/isa.h"
#include "ops/common/tasks.h"
#include "ops/pairwise/kernels.h"
#include "ops/pairwise/linear_light.h"
#include "ops/pairwise/operands.h"

namespace pmvis {
namespace {

// lab_similarity(images, kernel, dilation) -> similarity
void similarity_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const ColourOperands call(stack, kMaxMapSide, kMaxReach);
  const Tensor& images = call.images;
  const Colours colours{images.data<const uint8_t>(), linear_light(), images.size(2),
                        images.size(3), static_cast<int>(call.kernel / 2),
                        static_cast<int>(call.dilation)};
  Tensor output = Tensor::empty(
      {images.size(0), colours.neighbours(), images.size(2), images.size(3)},
      aoti_torch_dtype_float32());
  if (output.numel() != 0) {
    const int64_t count = bands(colours.height);
    for_each_task(images.size(0) * count, colours.scratch() * 4, [&](int64_t task, char* scratch) {
      PMVIS_BEST_ISA(similarity(colours, task / count, task % count,
                                reinterpret_cast<float*>(scratch), output.data<float>()));
    });
  }
  stack[0] = output.release();
}

// Bits of the neighbours whose agreement each pixel of each map may ask for.
std::vector<uint8_t> asked_neighbours(const Tensor& similarity, const Tensor& valid,
                                      float threshold, int dilation) {
  const int64_t height = similarity.size(2), width = similarity.size(3), area = height * width;
  std::vector<uint8_t> asks(static_cast<size_t>(similarity.size(0) * area));
  const uint8_t* good = valid.numel() != 0 ? valid.data<const uint8_t>() : nullptr;
  const int64_t count = bands(height);
  parallel_for(similarity.size(0) * count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / count, first = task % count * kBand;
      const int64_t last = first + kBand < height ? first + kBand : height;
      PMVIS_BEST_ISA(asking(similarity.data<const float>() + image * 8 * area,
                            good != nullptr ? good + image * area : nullptr, threshold, height,
                            width, dilation, first, last, asks.data() + image * area));
    }
  });
  return asks;
}

// Fills terms and edges (N,): bands in order, so that the sums are always the same.
template <typename T>
void run(const Pairs<T>& pairs, T* terms, T* edges) {
  const int64_t count = bands(pairs.height);
  const size_t tasks = static_cast<size_t>(pairs.instances * count);
  std::vector<double> sums(tasks);
  std::vector<int64_t> counts(tasks);
  // Neighbouring tasks are bands of different instances: threads get like shares of the large ones.
  for_each_task(pairs.instances * count, pairs.scratch(), [&](int64_t task, char* scratch) {
    const int64_t instance = task % pairs.instances, band = task / pairs.instances;
    const int64_t slot = instance * count + band;
    PMVIS_BEST_ISA(pairwise(pairs, instance, band, scratch, &sums[slot], &counts[slot]));
  });
  for (int64_t n = 0; n < pairs.instances; ++n) {
    double sum = 0;
    int64_t total = 0;
    for (int64_t band = 0; band < count; ++band) {
      sum += sums[n * count + band];
      total += counts[n * count + band];
    }
    terms[n] = static_cast<T>(sum);
    edges[n] = static_cast<T>(total);
  }
}

constexpr Requirement require_pairs = PairOperands::require;

void require_places(const Tensor& logits, const Tensor& similarity, const Tensor& image,
                    const Tensor& cells) {
  for (int64_t n = 0; n < logits.size(0); ++n) {
    const int64_t frame = image.data<const int64_t>()[n];
    require_pairs(frame >= 0 && frame < similarity.size(0), "an image index is out of range");
    const int64_t* box = cells.data<const int64_t>() + 4 * n;
    require_pairs(box[0] >= 0 && box[1] >= 0 && box[2] <= logits.size(2) &&
                      box[3] <= logits.size(1) && box[0] <= logits.size(2) &&
                      box[1] <= logits.size(1),
                  "cells reach beyond the map");
  }
}

template <typename T>
void run_typed(const PairOperands& call, const std::vector<uint8_t>& asks,
               const PairResults& results) {
  const Tensor& logits = call.logits;
  const Pairs<T> pairs{logits.data<const T>(), asks.data(), call.image.data<const int64_t>(),
                       call.cells.data<const int64_t>(), results.slopes<T>(), logits.size(0),
                       logits.size(1), logits.size(2), static_cast<int>(call.dilation)};
  run(pairs, results.terms.data<T>(), results.edges.data<T>());
}

void pairwise_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const PairOperands call(stack, kMaxMapSide);
  require_pairs(call.dilation >= 1 && call.dilation <= kMaxDilation, "the dilation must be 1 to 16");
  require_places(call.logits, call.similarity, call.image, call.cells);
  PairResults results(call.logits, call.with_gradient);
  const std::vector<uint8_t> asks = asked_neighbours(
      call.similarity, call.valid, call.threshold, static_cast<int>(call.dilation));
  (call.single() ? run_typed<float> : run_typed<double>)(call, asks, results);
  results.release(stack);
}

[[maybe_unused]] const bool registered =
    register_kernels("CPU", {{"lab_similarity", similarity_kernel},
                             {"pairwise_terms", pairwise_kernel}});

}  // namespace
}  // namespace pmvis
