// Colour affinity and the pairwise loss on the CPU: what the kernels take, and the two builds.
//
// Both work in bands of rows whose place depends on nothing but the row's number, so that sums never
// depend on the number of threads. Neighbours are counted row by row, the centre left out.
#pragma once

#include <cstddef>
#include <cstdint>

// Never a function of its own: the linker would keep one copy, perhaps the AVX2 one, for everyone.
#define PMVIS_ALWAYS inline __attribute__((always_inline))

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

// Images (B, 3, H, W) of sRGB bytes, to be averaged in LAB.
struct LabMeans {
  const uint8_t* pixels;
  const float* linear;  // (256,)
  int64_t height, width, stride, block;

  PMVIS_ALWAYS int64_t rows() const { return (height - block) / stride + 1; }
  PMVIS_ALWAYS int64_t columns() const { return (width - block) / stride + 1; }
  PMVIS_ALWAYS int64_t scratch() const { return 6 * columns(); }  // floats that a row needs
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

// similarity: rows of one band of one image into (B, K, H, W).
// asking: rows [begin, end) of one map; `valid` (H, W) may be null.
// pairwise: the gradient's rows of one band of one instance; adds to its terms and edges.
// lab_means: one row of one image, of L, a and b, means of block x block pixels every `stride`.
// clip_pairs: one frame of one instance. clip_pairwise: one instance.
#define PMVIS_DECLARE                                                                          \
  void similarity(const Colours& colours, int64_t image, int64_t band, float* scratch,         \
                  float* output);                                                              \
  void asking(const float* similarity, const uint8_t* valid, float threshold, int64_t height,  \
              int64_t width, int dilation, int64_t begin, int64_t end, uint8_t* asks);         \
  void pairwise(const Pairs<float>& pairs, int64_t instance, int64_t band, char* scratch,      \
                double* terms, int64_t* edges);                                                \
  void pairwise(const Pairs<double>& pairs, int64_t instance, int64_t band, char* scratch,     \
                double* terms, int64_t* edges);                                                \
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
#undef PMVIS_ALWAYS
}  // namespace pmvis
