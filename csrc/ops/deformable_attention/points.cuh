// Where the points of deformable attention lie and what they weigh, for its kernels on the GPU.
#pragma once

#include "ops/common/device.cuh"

namespace pmvis {

constexpr int kMaxLevels = 8;
constexpr int kMaxSide = 65000;  // rows and columns of a level fit into 16 bits, with those around

struct Level {
  int rows, columns, start;
};

// Rows in the upper half and columns in the lower half of each; as plain arguments, because cupy
// hands nothing else over.
#define PMVIS_LEVELS Int64 l0, Int64 l1, Int64 l2, Int64 l3, Int64 l4, Int64 l5, Int64 l6, Int64 l7
#define PMVIS_READ_LEVELS(table)                                 \
  {                                                              \
    const Int64 sizes[kMaxLevels] = {l0, l1, l2, l3, l4, l5, l6, l7}; \
    if (threadIdx.x == 0) {                                      \
      int start = 0;                                             \
      for (int l = 0; l < kMaxLevels; ++l) {                     \
        const int rows = static_cast<int>(sizes[l] >> 32);       \
        const int columns = static_cast<int>(sizes[l] & 0xffffffff); \
        table[l] = {rows, columns, start};                       \
        start += rows * columns;                                 \
      }                                                          \
    }                                                            \
    __syncthreads();                                             \
  }

// A point: the cell between four pixel centres, its upper left one first (-1 where that lies outside),
// the place inside it, and the weight. Whatever is no place has a cell without pixels.
template <typename A>
struct alignas(4 * sizeof(A)) Point {
  Word cell;  // row + 1 in the upper half, column + 1 in the lower
  A x, y, weight;
};

// The point at (x, y) in pixels of its level.
template <typename A>
PMVIS_DEVICE Point<A> place(const Level& level, A x, A y, A weight) {
  const bool near = x >= A(-1) && x < static_cast<A>(level.columns) && y >= A(-1) &&
                    y < static_cast<A>(level.rows);
  if (!near) {
    const Word row = static_cast<Word>(level.rows), column = static_cast<Word>(level.columns);
    return {(row + 1) << 16 | (column + 1), A(0), A(0), A(0)};
  }
  const A left = floor(x), top = floor(y);
  const Word row = static_cast<Word>(static_cast<int>(top) + 1);
  const Word column = static_cast<Word>(static_cast<int>(left) + 1);
  return {row << 16 | column, x - left, y - top, weight};
}

// Tokens of the corners, -1 where there is none or it is padding (of which there may be none):
// upper left, upper right, lower left, lower right.
PMVIS_DEVICE void corner_tokens(const Level& level, Word cell, const unsigned char* padding,
                                int (&tokens)[4]) {
  const int row = static_cast<int>(cell >> 16) - 1, column = static_cast<int>(cell & 0xffff) - 1;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int y = row + (c >> 1), x = column + (c & 1);
    const bool inside = y >= 0 && y < level.rows && x >= 0 && x < level.columns;
    tokens[c] = inside ? level.start + y * level.columns + x : -1;
    if (padding != nullptr && inside && padding[tokens[c]] != 0) tokens[c] = -1;
  }
}

// The operands of a call, as they lie in memory: (B, Q, L, R) references xy or cxcywh, (B, Q, M, L,
// P, 2) places, (B, Q, M, L, P) scores, (B, S) padding. Fused, places are offsets round the
// references and scores logits; otherwise places are xy in [0, 1] and scores weights.
template <typename A>
struct Source {
  const A *references, *places, *scores;
  const unsigned char* padding;
  int levels, points, heads, size;

  // Of a row of B x Q x M.
  PMVIS_DEVICE const A* logits(Int64 row) const { return scores + row * levels * points; }
  PMVIS_DEVICE const A* reference(Int64 row, int level) const {
    return references + (row / heads * levels + level) * size;
  }
};

// The pixels that an offset of 1 moves a point by.
template <typename A>
PMVIS_DEVICE void offset_units(const Source<A>& source, const Level& level, const A* reference,
                               A (&unit)[2]) {
  unit[0] = unit[1] = A(1);
  if (source.size != 4) return;
  const A share = A(0.5) / static_cast<A>(source.points);
  unit[0] = reference[2] * share * static_cast<A>(level.columns);
  unit[1] = reference[3] * share * static_cast<A>(level.rows);
}

// Point i of a row, in pixels of its level.
template <bool F, typename A>
PMVIS_DEVICE Point<A> find(const Source<A>& source, const Level& level, Int64 row, int i,
                           A weight) {
  const A* from = source.places + 2 * (row * source.levels * source.points + i);
  A start[2] = {A(0), A(0)};
  A unit[2] = {static_cast<A>(level.columns), static_cast<A>(level.rows)};
  if constexpr (F) {
    const A* reference = source.reference(row, i / source.points);
    start[0] = reference[0] * unit[0];
    start[1] = reference[1] * unit[1];
    offset_units(source, level, reference, unit);
  }
  return place(level, start[0] + from[0] * unit[0] - A(0.5), start[1] + from[1] * unit[1] - A(0.5),
               weight);
}

// The softmax of a row's logits: e^(logit - top) * unit. It is no number where a logit is none.
template <typename A>
struct Softmax {
  A top, unit;
  PMVIS_DEVICE A operator()(A logit) const { return exp(logit - top) * unit; }
};

// Found by the lanes of a group together; `works` is the same for all of them.
template <int G, typename A>
PMVIS_DEVICE Softmax<A> softmax_of(const A* logits, int number, int lane, bool works) {
  const bool some = works && number > 0;
  A top = some ? logits[least(lane, number - 1)] : A(0);
  for (int i = lane; some && i < number; i += G) top = logits[i] > top ? logits[i] : top;
#pragma unroll
  for (int step = 1; step < G; step *= 2) {
    const A other = from_lane(top, step);
    top = other > top ? other : top;
  }
  A sum = A(0);
  for (int i = lane; some && i < number; i += G) sum += exp(logits[i] - top);
#pragma unroll
  for (int step = 1; step < G; step *= 2) sum += from_lane(sum, step);
  return {top, A(1) / sum};
}

}  // namespace pmvis
