// From mask logits to bits on the GPU: upsampled (bilinear, corners not aligned), compared with a
// threshold, column by column, as COCO counts. A thread walks down 32 rows of a column and keeps one
// bit for each: the pixel itself, or whether it differs from the one before it, where a run ends.
// Full-size maps are never stored. Then areas, boxes and overlaps of such bits.
#pragma once

#include "device.cuh"

namespace pmvis {

constexpr int kStrip = 32;  // rows of a word
constexpr int kStripsOfBlock = 8;

// Where the target's pixels lie between the source's, along one axis.
struct Axis {
  int size;     // of the source
  float scale;  // source pixels for a target pixel

  // Pixel `low` has the weight 1 - part, `high` has part.
  PMVIS_DEVICE void find(int target, int* low, int* high, float* part) const {
    float at = __fsub_rn(__fmul_rn(scale, static_cast<float>(target) + 0.5f), 0.5f);
    if (!(at > 0.0f)) at = 0.0f;
    *low = least(static_cast<int>(at), size - 1);
    *high = least(*low + 1, size - 1);
    *part = at - static_cast<float>(*low);
  }
};

// Rounded as torch does on the CPU, so that masks are the same to the pixel.
PMVIS_DEVICE float between(float a, float b, float part) {
  return __fmaf_rn(1.0f - part, a, __fmul_rn(part, b));
}

// A column of the target: walks down, rows of the source at hand.
struct Column {
  const float* logits;  // (h, w)
  Axis down;
  int width, left, right;
  float part;
  int low, high;         // rows at hand, -1 for none
  float upper, lower;    // this column's values there

  PMVIS_DEVICE Column(const float* logits, const Axis& down, const Axis& along, int x)
      : logits(logits), down(down), width(along.size), low(-1), high(-1), upper(0.0f),
        lower(0.0f) {
    along.find(x, &left, &right, &part);
  }
  PMVIS_DEVICE float row(int y) const {
    const float* from = logits + static_cast<Int64>(y) * width;
    return between(from[left], from[right], part);
  }
  PMVIS_DEVICE float value(int y) {
    int above, below;
    float share;
    down.find(y, &above, &below, &share);
    if (above != low) {
      upper = above == high ? lower : row(above);
      low = above;
    }
    if (below != high) {
      lower = row(below);
      high = below;
    }
    return between(upper, lower, share);
  }
};

// logits (N, h, w) -> words (N, W, strips) and their numbers of bits; the last word of a column has
// zeros below the frame. `rows` and `columns`, where not null, name the pixels of the enlarged map
// that are taken. With `changes` bits mark pixels that differ from the one before. Grid: blocks of 32
// columns, of kStripsOfBlock strips, N.
__global__ void __launch_bounds__(32 * kStripsOfBlock)
    mask_events(const float* logits, const int* rows, const int* columns, int* words, int* counts,
                int h, int w, int height, int width, float scale_y, float scale_x, float threshold,
                int changes) {
  const int x = blockIdx.x * 32 + threadIdx.x, strip = blockIdx.y * kStripsOfBlock + threadIdx.y;
  const int strips = (height + kStrip - 1) / kStrip;
  if (x >= width || strip >= strips) return;
  const float* map = logits + static_cast<Int64>(blockIdx.z) * h * w;
  const Axis down{h, scale_y}, along{w, scale_x};
  Column column(map, down, along, columns != nullptr ? columns[x] : x);
  const int first = strip * kStrip, last = least(first + kStrip, height);
  bool before = false;
  if (changes != 0 && first > 0) {
    before = column.value(rows != nullptr ? rows[first - 1] : first - 1) > threshold;
  } else if (changes != 0 && x > 0) {
    Column previous(map, down, along, columns != nullptr ? columns[x - 1] : x - 1);
    before = previous.value(rows != nullptr ? rows[height - 1] : height - 1) > threshold;
  }
  Word word = 0;
  for (int y = first; y < last; ++y) {
    const bool now = column.value(rows != nullptr ? rows[y] : y) > threshold;
    word |= static_cast<Word>(now != before) << (y - first);
    before = changes != 0 && now;
  }
  const Int64 at = (static_cast<Int64>(blockIdx.z) * width + x) * strips + strip;
  words[at] = static_cast<int>(word);
  counts[at] = __popc(word);
}

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

// words (N, W, strips) and the place of each one's first bit among all bits -> places in the column-
// major frame, mask after mask. Grid: blocks of 256 words.
__global__ void __launch_bounds__(256)
    mask_places(const int* words, const Int64* starts, int* places, Int64 number, int strips,
                int width, int height) {
  const Int64 at = static_cast<Int64>(blockIdx.x) * 256 + threadIdx.x;
  if (at >= number) return;
  const int strip = static_cast<int>(at % strips), x = static_cast<int>(at / strips % width);
  Int64 to = starts[at];
  for (Word word = static_cast<Word>(words[at]); word != 0; word &= word - 1) {
    const int bit = __ffs(static_cast<int>(word)) - 1;
    places[to++] = x * height + strip * kStrip + bit;
  }
}

}  // namespace pmvis
