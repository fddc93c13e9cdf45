// Affinity and pairwise loss of clips on the CPU: what the kernels take, and the two builds.
#pragma once

#include <cstdint>

#include "ops/common/isa.h"
#include "ops/pairwise/kernels.h"

namespace pmvis {

// Images (B, 3, H, W) of sRGB bytes, to be averaged in LAB.
struct LabMeans {
  const uint8_t* pixels;
  const float* linear;  // (256,)
  int64_t height, width, stride, block;

  PMVIS_ALWAYS int64_t rows() const { return (height - block) / stride + 1; }
  PMVIS_ALWAYS int64_t columns() const { return (width - block) / stride + 1; }
  PMVIS_ALWAYS int64_t scratch() const { return 6 * columns(); }  // floats that a row needs
};

// What leads from a pixel to its neighbours in a clip of T frames: neighbour k of row y and column x in
// frame t lies in frame (t + steps[k][0]) mod T, steps[k][1] rows and steps[k][2] columns away. In the
// next frame an instance's shift is added: where the object that was here went.
struct ClipSteps {
  const int64_t* steps;   // (K, 3) frames, 0 or 1, rows and columns
  const int64_t* shifts;  // (N, T, 2) rows and columns from each frame to the next
  int64_t neighbours, frames, height, width;

  // Rows and columns from frame t of instance n to neighbour k.
  PMVIS_ALWAYS void find(int64_t n, int64_t t, int64_t k, int64_t* dy, int64_t* dx) const {
    const int64_t* shift = shifts + 2 * (n * frames + t);
    const bool next = steps[3 * k] != 0;
    *dy = steps[3 * k + 1] + (next ? shift[0] : 0);
    *dx = steps[3 * k + 2] + (next ? shift[1] : 0);
  }
  PMVIS_ALWAYS int64_t frame(int64_t t, int64_t k) const { return (t + steps[3 * k]) % frames; }
};

// Colours of clips, and the boxes whose pairs are wanted.
struct ClipColours {
  ClipSteps clip;
  const float* colours;   // (B, T, 3, H, W) L, a and b
  const float* patches;   // (B, T, h, w, C) unit vectors, two each way for a pixel, or null
  const int64_t* video;   // (N,) in [0, B)
  const int64_t* cells;   // (N, T, 4) x0, y0, x1, y1, far edge exclusive
  int64_t patch_height, patch_width, channels;
  float threshold, patch_weight;
};

// One call of the loss of clips; arrays are contiguous.
template <typename T>
struct ClipPairs {
  ClipSteps clip;
  const T* logits;        // (N, T, H, W)
  const uint16_t* pairs;  // (N, T, H, W) bit k: the pixel and its neighbour k are a pair
  T* gradient;            // (N, T, H, W) of the terms, or null where it is not wanted

  // Elements of a row, a chunk wider than the map on either side, and bytes that an instance needs.
  PMVIS_ALWAYS int64_t columns() const { return clip.width + 3 * kChunk; }
  PMVIS_ALWAYS int64_t scratch() const {
    const int64_t row = columns() * static_cast<int64_t>(5 * sizeof(T));
    return clip.frames * clip.height * (row + 64) + 64;
  }
};

// lab_means: one row of one image, of L, a and b, means of block x block pixels every `stride`.
// clip_pairs: one frame of one instance. clip_pairwise: one instance.
#define PMVIS_DECLARE                                                                          \
  void lab_means(const LabMeans& means, int64_t image, int64_t row, float* scratch,            \
                 float* output);                                                               \
  void clip_pairs(const ClipColours& call, int64_t instance, int64_t frame, float* scratch,    \
                  uint16_t* output);                                                           \
  void clip_pairwise(const ClipPairs<float>& call, int64_t instance, char* scratch,            \
                     double* terms, int64_t* edges);                                           \
  void clip_pairwise(const ClipPairs<double>& call, int64_t instance, char* scratch,           \
                     double* terms, int64_t* edges);

namespace base {
PMVIS_DECLARE
}
namespace avx2 {
PMVIS_DECLARE
}

#undef PMVIS_DECLARE
}  // namespace pmvis
