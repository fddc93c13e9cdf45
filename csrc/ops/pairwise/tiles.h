// What the GPU launchers of images and of clips share: the tiles of a map, a thread for each cell, and
// the sums over those of an instance.
#pragma once

#include "ops/common/gpu.h"
#include "ops/pairwise/math.cuh"
#include "ops/pairwise/operands.h"

namespace pmvis {

const dim3 kTileThreads(kTileWidth, kTileHeight);

// The blocks of `maps` maps, each of `rows` rows.
inline dim3 tiles(int64_t height, int64_t width, int64_t maps, int64_t rows = kTileHeight) {
  return {blocks(width, kTileWidth), blocks(height, rows), static_cast<unsigned>(maps)};
}

// Room for what each tile of each of N >= 1 instances sums up.
class TileSums {
 public:
  TileSums(const Gpu& gpu, int64_t instances, int64_t count)
      : terms_(gpu.empty({instances, count}, aoti_torch_dtype_float64())),
        edges_(gpu.empty({instances, count}, aoti_torch_dtype_int64())) {}

  double* terms() const { return terms_.data<double>(); }
  Int64* edges() const { return edges_.data<Int64>(); }

  // Writes the terms and edges of instances.
  template <typename T>
  void add_up(const Gpu& gpu, const PairResults& results) const {
    gpu.launch(&pairwise_sums<T>, dim3(static_cast<unsigned>(terms_.size(0))), kTile, 0,
               terms_.data<const double>(), edges_.data<const Int64>(),
               static_cast<int>(terms_.size(1)), results.terms.data<T>(), results.edges.data<T>());
  }

 private:
  Tensor terms_, edges_;  // (N, count)
};

}  // namespace pmvis
