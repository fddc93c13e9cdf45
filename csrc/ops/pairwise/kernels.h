// Colour affinity and the pairwise loss on the CPU: what the kernels take, and the two builds.
//
// Both work in bands of rows whose place depends on nothing but the row's number, so that sums never
// depend on the number of threads. Neighbours are counted row by row, the centre left out.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/common/isa.h"

namespace pmvis {

constexpr int64_t kBand = 32;           // rows of a band
constexpr int kChunk = 16;              // pixels handled together
constexpr int kMaxDilation = 16;        // of the loss
constexpr int kMaxReach = 64;           // radius x dilation of the similarity
constexpr int64_t kMaxMapSide = 1 << 20;

PMVIS_ALWAYS int64_t bands(int64_t height) { return (height + kBand - 1) / kBand; }

// Images (B, 3, H, W) of sRGB bytes, and the linear value of each byte.
struct Colours {
  const uint8_t* pixels;
  const float* linear;  // (256,)
  int64_t height, width;
  int radius, dilation;

  PMVIS_ALWAYS int64_t reach() const { return static_cast<int64_t>(radius) * dilation; }
  PMVIS_ALWAYS int64_t neighbours() const { return (2 * radius + 1) * (2 * radius + 1) - 1; }
  // Floats of a padded plane, and of all that a band needs.
  PMVIS_ALWAYS int64_t stride() const { return width + 2 * reach(); }
  PMVIS_ALWAYS int64_t scratch() const { return 3 * (reach() + 1) * stride() + 3 * width; }
};

// One call of the loss; arrays are contiguous.
template <typename T>
struct Pairs {
  const T* logits;       // (N, H, W)
  const uint8_t* asks;   // (B, H, W) bit k: the pixel may ask for the agreement of neighbour k
  const int64_t* image;  // (N,) in [0, B)
  const int64_t* cells;  // (N, 4) x0, y0, x1, y1 of the box in pixels of the map, far edge exclusive
  T* gradient;           // (N, H, W) of the terms, or null where it is not wanted
  int64_t instances, height, width;
  int dilation;

  // Bytes that a band needs, whatever the box.
  PMVIS_ALWAYS int64_t scratch() const {
    const int64_t columns = width + 6 * dilation + kChunk;
    return (dilation + 1) * columns * static_cast<int64_t>(5 * sizeof(T) + 1) + 64;
  }
};

// similarity: rows of one band of one image into (B, K, H, W).
// asking: rows [begin, end) of one map; `valid` (H, W) may be null.
// pairwise: the gradient's rows of one band of one instance; adds to its terms and edges.
#define PMVIS_DECLARE                                                                          \
  void similarity(const Colours& colours, int64_t image, int64_t band, float* scratch,         \
                  float* output);                                                              \
  void asking(const float* similarity, const uint8_t* valid, float threshold, int64_t height,  \
              int64_t width, int dilation, int64_t begin, int64_t end, uint8_t* asks);         \
  void pairwise(const Pairs<float>& pairs, int64_t instance, int64_t band, char* scratch,      \
                double* terms, int64_t* edges);                                                \
  void pairwise(const Pairs<double>& pairs, int64_t instance, int64_t band, char* scratch,     \
                double* terms, int64_t* edges);

namespace base {
PMVIS_DECLARE
}
namespace avx2 {
PMVIS_DECLARE
}

#undef PMVIS_DECLARE
}  // namespace pmvis
