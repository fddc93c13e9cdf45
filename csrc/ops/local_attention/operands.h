// The operands of local attention, checked, for every device.
#pragma once

#include "ops/common/stable_tensor.h"

namespace pmvis {

// What both operators take; a batch of maps of height x width cells.
struct WindowOperands {
  static constexpr Requirement require{"local_attention"};
  static constexpr int64_t kMostCells = 1 << 30;  // with a window's sides still an int
  const Tensor &query, &key, &value;
  int64_t height, width, side = 0;

  // `windows` holds a number for each cell of each window.
  WindowOperands(const Tensor& query, const Tensor& key, const Tensor& value,
                 const Tensor& windows, int64_t height, int64_t width, int64_t most)
      : query(query), key(key), value(value), height(height), width(width) {
    require(height > 0 && width > 0 && height <= kMostCells / width,
            "height and width must be positive, and their cells at most 2^30");
    require(query.dim() == 3 && query.size(1) == height * width,
            "query must be (B, height * width, D)");
    const int64_t batch = query.size(0);
    require(key.is({batch, height * width, query.size(2)}), "key must be as query");
    require(value.is({batch, height * width, -1}), "value must be (B, height * width, E)");
    require(query.contiguous() && key.contiguous() && value.contiguous(),
            "tensors must be contiguous");
    require(key.dtype() == value.dtype() && query.dtype() == value.dtype(),
            "query, key and value must have one type");
    require(query.size(2) <= kMostCells && value.size(2) <= kMostCells, "there are too many channels");
    require(windows.dim() == 3, "what belongs to windows must have 3 dimensions");
    while (side * side < windows.size(2) && side <= most) ++side;
    require(side % 2 == 1 && side <= most, "windows must have an odd side up to 23");
    require_windows(windows);
  }
  int64_t batch() const { return query.size(0); }
  int64_t cells() const { return height * width; }
  void require_windows(const Tensor& windows) const {
    require(windows.contiguous() && windows.is({batch(), cells(), side * side}),
            "what belongs to windows must be (B, height * width, side^2)");
  }
  void require_gradient(const Tensor& grad) const {
    require(grad.contiguous() && grad.dtype() == value.dtype() &&
                grad.is({batch(), cells(), value.size(2)}),
            "the gradient must be as value");
  }
};

}  // namespace pmvis
