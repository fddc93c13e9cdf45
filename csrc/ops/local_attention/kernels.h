// Local attention on the CPU: what the kernels take, and the two builds of them.
#pragma once

#include <cstdint>

namespace pmvis {

// Widest window, in cells.
constexpr int64_t kMaxWindow = 23;
// Rows of queries that weighted sums are made for before the next channels are taken.
constexpr int64_t kWindowRows = 8;

// Maps of height x width cells, N in all, row by row; each cell looks at the side x side cells round
// it in another map of its item of the batch. Every array is contiguous.
struct Windows {
  int64_t batch, height, width, side;

  int64_t cells() const { return height * width; }
  int64_t area() const { return side * side; }
  int64_t radius() const { return side / 2; }
  int64_t bands() const { return (height + kWindowRows - 1) / kWindowRows; }
};

// Channels that a vectorised loop takes at a time: 64 bytes, a line of the cache.
template <typename T>
constexpr int64_t kWindowLanes = 64 / sizeof(T);

// Elements of a row of a turned map (B, h, C, pitch), which has zeros to both sides.
template <typename T>
int64_t pitch_of(const Windows& windows) {
  return windows.width + windows.side + kWindowLanes<T>;
}

// Parts of the channels of a packed map (B, parts, N, kWindowLanes).
template <typename T>
int64_t parts_of(int64_t channels) {
  return (channels + kWindowLanes<T> - 1) / kWindowLanes<T>;
}

// Products of queries (B, N, C) with the cells of their windows, plus `terms` (B, N, side^2) where
// there are any. Without weights they are logits and become weights by a softmax; with weights (like
// the terms) they are the slopes of those, and become the slopes of the logits.
template <typename T>
struct WindowScores {
  const T* query;
  const T* turned;
  int64_t channels;
  const T* terms;
  const T* weights;
  T* output;  // (B, N, side^2)
};

// Sums (B, N, C) of a packed map over windows: a cell's own weights for the cells round it or,
// gathering, those that the cells round it have for the cell.
template <typename T>
struct WindowSums {
  const T* packed;
  int64_t channels;
  const T* weights;
  bool gathers;
  T* output;
};

// turn_rows, score_rows: rows [begin, end) of B x h. pack_parts: parts [begin, end) of B x parts.
// sum_parts: parts [begin, end) of B x bands x parts, in that order.
#define PMVIS_DECLARE(T)                                                                          \
  void turn_rows(const Windows& windows, const T* from, int64_t channels, T* to, int64_t begin,   \
                 int64_t end);                                                                    \
  void pack_parts(const Windows& windows, const T* from, int64_t channels, T* to, int64_t begin,  \
                  int64_t end);                                                                   \
  void score_rows(const Windows& windows, const WindowScores<T>& call, int64_t begin,             \
                  int64_t end);                                                                   \
  void sum_parts(const Windows& windows, const WindowSums<T>& call, int64_t begin, int64_t end);

namespace base {
PMVIS_DECLARE(float)
PMVIS_DECLARE(double)
}  // namespace base

namespace avx2 {
PMVIS_DECLARE(float)
PMVIS_DECLARE(double)
}  // namespace avx2

#undef PMVIS_DECLARE
}  // namespace pmvis
