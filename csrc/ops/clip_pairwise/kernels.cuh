// Affinity and pairwise loss of clips on the GPU (STPA of BoxVIS). As for images every pixel adds
// up its own share: it meets its neighbours, and the pixels whose neighbour it is.
#pragma once

#include "ops/pairwise/math.cuh"

namespace pmvis {

constexpr int kMaxSteps = 16;         // two of them in an Int64
constexpr int kStepOffset = 1 << 11;  // makes rows and columns positive
constexpr int kFarShift = 1 << 24;    // beyond every map

// What leads to a neighbour: the next frame or the same one, rows and columns.
struct ClipStep {
  int next, dy, dx;
};

// A kernel's neighbours come as numbers of 32 bits, two by two.
#define PMVIS_STEPS \
  Int64 s0, Int64 s1, Int64 s2, Int64 s3, Int64 s4, Int64 s5, Int64 s6, Int64 s7
#define PMVIS_READ_STEPS(table, thread)                                          \
  {                                                                              \
    const Int64 packed[kMaxSteps / 2] = {s0, s1, s2, s3, s4, s5, s6, s7};        \
    for (int k = 0; (thread) == 0 && k < kMaxSteps; ++k) {                       \
      const Word bits = static_cast<Word>(packed[k / 2] >> (32 * (k % 2)));      \
      (table)[k] = {static_cast<int>(bits >> 24),                                \
                    static_cast<int>(bits >> 12 & 4095) - kStepOffset,           \
                    static_cast<int>(bits & 4095) - kStepOffset};                \
    }                                                                            \
    __syncthreads();                                                             \
  }

// Rows and columns to a neighbour; `shift` is that of the frame from which the step leads.
PMVIS_DEVICE ClipStep moved(ClipStep step, const Int64* shift) {
  if (step.next == 0) return step;
  const Int64 y = shift[0], x = shift[1];
  step.dy += static_cast<int>(y > kFarShift ? kFarShift : y < -kFarShift ? -kFarShift : y);
  step.dx += static_cast<int>(x > kFarShift ? kFarShift : x < -kFarShift ? -kFarShift : x);
  return step;
}

PMVIS_DEVICE bool in_cells(const Int64* cells, int y, int x) {
  return x >= cells[0] && y >= cells[1] && x < cells[2] && y < cells[3];
}

// images (B, 3, H, W) -> means (B, 3, h, w) of L, a and b. Grid: tiles, B.
__global__ void __launch_bounds__(kTile)
    lab_means(const unsigned char* images, float* means, int height, int width, int rows,
              int columns, int stride, int block) {
  __shared__ float linear[256];
  const int thread = threadIdx.y * kTileWidth + threadIdx.x;
  linear[thread] = linear_light(thread);
  __syncthreads();
  const int x = blockIdx.x * kTileWidth + threadIdx.x, y = blockIdx.y * kTileHeight + threadIdx.y;
  if (x >= columns || y >= rows) return;
  const Int64 area = static_cast<Int64>(height) * width;
  const unsigned char* image = images + blockIdx.z * 3 * area;
  float sums[3] = {0.0f, 0.0f, 0.0f};
  for (int cell = 0; cell < block * block; ++cell) {
    const Int64 at = static_cast<Int64>(y * stride + cell / block) * width + x * stride +
                     cell % block;
    float lab[3];
    lab_colour(linear[image[at]], linear[image[at + area]], linear[image[at + 2 * area]], lab);
    for (int c = 0; c < 3; ++c) sums[c] += lab[c];
  }
  for (int c = 0; c < 3; ++c) {
    means[((blockIdx.z * 3 + c) * static_cast<Int64>(rows) + y) * columns + x] =
        sums[c] / static_cast<float>(block * block);
  }
}

// Mean cosine of the 3 x 3 unit vectors around two pixels, 0 where there is none; frames (h, w, C).
PMVIS_DEVICE float patch_similarity(const float* here, int y, int x, const float* there, int v,
                                    int u, int height, int width, int channels) {
  float sum = 0.0f;
  for (int cell = 0; cell < 9; ++cell) {
    const int down = cell / 3 - 1, along = cell % 3 - 1;
    const int row = 2 * y + down, column = 2 * x + along;
    const int other_row = 2 * v + down, other = 2 * u + along;
    if (row < 0 || other_row < 0 || column < 0 || other < 0 || row >= height ||
        other_row >= height || column >= width || other >= width) {
      continue;
    }
    const float* a = here + (static_cast<Int64>(row) * width + column) * channels;
    const float* b = there + (static_cast<Int64>(other_row) * width + other) * channels;
    for (int c = 0; c < channels; ++c) sum += a[c] * b[c];
  }
  return sum / 9.0f;
}

// colours (B, T, 3, H, W), patches (B, T, h, w, C) or null, video (N,), cells (N, T, 4), shifts
// (N, T, 2) -> pairs (N, T, H, W), bit k for neighbour k. A video index out of range gives none.
// Grid: tiles, N T.
__global__ void __launch_bounds__(kTile)
    clip_pairs(const float* colours, const float* patches, const Int64* video, const Int64* cells,
               const Int64* shifts, short* pairs, int videos, int frames, int height, int width,
               int patch_height, int patch_width, int channels, int number, float threshold,
               float patch_weight, PMVIS_STEPS) {
  __shared__ ClipStep steps[kMaxSteps];
  PMVIS_READ_STEPS(steps, threadIdx.y * kTileWidth + threadIdx.x);
  const int x = blockIdx.x * kTileWidth + threadIdx.x, y = blockIdx.y * kTileHeight + threadIdx.y;
  if (x >= width || y >= height) return;
  const int n = blockIdx.z / frames, t = blockIdx.z % frames;
  const Int64 area = static_cast<Int64>(height) * width, at = static_cast<Int64>(y) * width + x;
  const Int64 patch = static_cast<Int64>(patch_height) * patch_width * channels;
  const bool known = video[n] >= 0 && video[n] < videos;
  const Int64 first = known ? video[n] * frames : 0;
  const Int64* box = cells + 4 * static_cast<Int64>(blockIdx.z);
  const float* here = colours + (first + t) * 3 * area + at;
  const bool inside = in_cells(box, y, x);
  int bits = 0;
  for (int k = 0; known && k < number; ++k) {
    const int next = steps[k].next != 0 ? (t + 1) % frames : t;
    if (steps[k].next != 0 && (next == t || !inside)) continue;
    const ClipStep step = moved(steps[k], shifts + 2 * static_cast<Int64>(blockIdx.z));
    const int v = y + step.dy, u = x + step.dx;
    if (v < 0 || v >= height || u < 0 || u >= width) continue;
    const bool theirs = in_cells(cells + 4 * (static_cast<Int64>(n) * frames + next), v, u);
    if (step.next != 0 ? !theirs : !(inside || theirs)) continue;
    const float* there =
        colours + (first + next) * 3 * area + static_cast<Int64>(v) * width + u;
    float square = 0.0f;
    for (int c = 0; c < 3; ++c) {
      const float d = here[c * area] - there[c * area];
      square += d * d;
    }
    float similar = expf(-0.5f * sqrtf(square));
    // No cosine is above 1.
    if (patches != nullptr && similar + patch_weight * 1.001f >= threshold) {
      similar += patch_weight *
                 patch_similarity(patches + (first + t) * patch, y, x,
                                  patches + (first + next) * patch, v, u, patch_height,
                                  patch_width, channels);
    }
    bits |= (similar >= threshold) << k;
  }
  pairs[blockIdx.z * area + at] = static_cast<short>(bits);
}

// logits and pairs (N, T, H, W), shifts (N, T, 2) -> gradient (N, T, H, W) of the terms, or null, and
// sums of terms and edges of every tile. Grid: tiles, N T.
template <typename T>
__global__ void __launch_bounds__(kTile)
    clip_tiles(const T* logits, const short* pairs, const Int64* shifts, T* gradient,
               double* terms, Int64* edges, int frames, int height, int width, int number,
               PMVIS_STEPS) {
  __shared__ ClipStep steps[kMaxSteps];
  __shared__ double term_room[kTile / 32];
  __shared__ Int64 edge_room[kTile / 32];
  const int thread = threadIdx.y * kTileWidth + threadIdx.x;
  PMVIS_READ_STEPS(steps, thread);
  const int x = blockIdx.x * kTileWidth + threadIdx.x, y = blockIdx.y * kTileHeight + threadIdx.y;
  const int n = blockIdx.z / frames, t = blockIdx.z % frames;
  const Int64 area = static_cast<Int64>(height) * width, at = static_cast<Int64>(y) * width + x;
  const Int64 first = static_cast<Int64>(n) * frames;  // map of the instance's first frame
  const bool whole = x < width && y < height;
  const int mine = whole ? pairs[(first + t) * area + at] : 0;
  const End<T> end = end_of(whole ? logits[(first + t) * area + at] : T(0));
  T term = T(0), slope = T(0);
  Int64 count = 0;
  for (int k = 0; whole && k < number; ++k) {
    const int next = steps[k].next != 0 ? (t + 1) % frames : t;
    ClipStep step = moved(steps[k], shifts + 2 * (first + t));
    int v = y + step.dy, u = x + step.dx;
    if ((mine >> k & 1) != 0 && v >= 0 && v < height && u >= 0 && u < width) {
      const Int64 there = (first + next) * area + static_cast<Int64>(v) * width + u;
      const PairOf<T> pair = pair_of(end, end_of(logits[there]));
      term += pair.term;
      slope += pair.slope;
      ++count;
    }
    if (gradient == nullptr) continue;
    const int last = steps[k].next != 0 ? (t + frames - 1) % frames : t;
    step = moved(steps[k], shifts + 2 * (first + last));
    v = y - step.dy;
    u = x - step.dx;
    if (v < 0 || v >= height || u < 0 || u >= width) continue;
    const Int64 from = (first + last) * area + static_cast<Int64>(v) * width + u;
    if ((pairs[from] >> k & 1) != 0) slope += pair_of(end, end_of(logits[from])).slope;
  }
  if (gradient != nullptr && whole) gradient[(first + t) * area + at] = slope;
  const Int64 tile =
      (static_cast<Int64>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const double total = block_sum(static_cast<double>(term), term_room, thread);
  count = block_sum(count, edge_room, thread);
  if (thread == 0) {
    terms[tile] = total;
    edges[tile] = count;
  }
}

}  // namespace pmvis
