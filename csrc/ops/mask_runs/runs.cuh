// From mask logits to bits on the GPU: upsampled (bilinear, corners not aligned), compared with a
// threshold, column by column, as COCO counts. A thread walks down 32 rows of a column and keeps one
// bit for each: the pixel itself, or whether it differs from the one before it, where a run ends.
// Full-size maps are never stored.
#pragma once

#include "ops/common/device.cuh"

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
