// Stacks of masks on the GPU, a bit for each pixel as in runs.cuh: packed, and asked for areas, boxes
// and overlaps.
#pragma once

#include "ops/mask_runs/runs.cuh"

namespace pmvis {

// masks (N, H, W) bytes -> words (N, W, strips). Grid as of mask_events.
__global__ void __launch_bounds__(32 * kStripsOfBlock)
    mask_pack(const unsigned char* masks, int* words, int height, int width) {
  const int x = blockIdx.x * 32 + threadIdx.x, strip = blockIdx.y * kStripsOfBlock + threadIdx.y;
  const int strips = (height + kStrip - 1) / kStrip;
  if (x >= width || strip >= strips) return;
  const unsigned char* mask = masks + static_cast<Int64>(blockIdx.z) * height * width;
  const int first = strip * kStrip, last = least(first + kStrip, height);
  Word word = 0;
  for (int y = first; y < last; ++y) {
    word |= static_cast<Word>(mask[static_cast<Int64>(y) * width + x] != 0) << (y - first);
  }
  words[(static_cast<Int64>(blockIdx.z) * width + x) * strips + strip] = static_cast<int>(word);
}

// Foreground pixels, and the first and last column and row with any.
struct Extent {
  int area, left, top, right, bottom;

  PMVIS_DEVICE void add(const Extent& other) {
    area += other.area;
    left = least(left, other.left);
    top = least(top, other.top);
    right = most(right, other.right);
    bottom = most(bottom, other.bottom);
  }
};

// words (N, W, strips) -> extents (N, 5): area and x0, y0, x1, y1, far edge exclusive, zeros where
// there is nothing. Grid: N; kFold threads.
constexpr int kFold = 256;
__global__ void __launch_bounds__(kFold)
    mask_extents(const int* words, Int64* extents, int strips, int width) {
  __shared__ Extent room[kFold / 32];
  const int* mine = words + static_cast<Int64>(blockIdx.x) * width * strips;
  constexpr int kFar = 0x7fffffff;
  Extent sum{0, kFar, kFar, -1, -1};
  for (int at = threadIdx.x; at < width * strips; at += kFold) {
    const int word = mine[at], x = at / strips, y = at % strips * kStrip;
    if (word == 0) continue;
    sum.add({__popc(static_cast<Word>(word)), x, y + __ffs(word) - 1, x, y + 31 - __clz(word)});
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    sum.add({from_lane(sum.area, step), from_lane(sum.left, step), from_lane(sum.top, step),
             from_lane(sum.right, step), from_lane(sum.bottom, step)});
  }
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kFold / 32; ++warp) sum.add(room[warp]);
  Int64* out = extents + 5 * static_cast<Int64>(blockIdx.x);
  const bool some = sum.area != 0;
  out[0] = sum.area;
  out[1] = some ? sum.left : 0;
  out[2] = some ? sum.top : 0;
  out[3] = some ? sum.right + 1 : 0;
  out[4] = some ? sum.bottom + 1 : 0;
}

// Words of N and of M masks -> their common pixels (N, M). Grid: M, N; kFold threads.
__global__ void __launch_bounds__(kFold)
    mask_overlaps(const int* words, const int* others, Int64* overlaps, int number) {
  __shared__ int room[kFold / 32];
  const int* a = words + static_cast<Int64>(blockIdx.y) * number;
  const int* b = others + static_cast<Int64>(blockIdx.x) * number;
  int sum = 0;
  for (int at = threadIdx.x; at < number; at += kFold) {
    sum += __popc(static_cast<Word>(a[at] & b[at]));
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += from_lane(sum, step);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kFold / 32; ++warp) sum += room[warp];
  overlaps[static_cast<Int64>(blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

}  // namespace pmvis
