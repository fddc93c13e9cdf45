// Local attention on the GPU. A block takes eight neighbouring cells of a row, whose windows share
// most of their columns; no window is ever copied to memory. Each result is the sum of one thread or
// warp in one order, so that results are always the same.
#pragma once

#include "ops/common/device.cuh"

namespace pmvis {

constexpr int kCells = 8;       // of a block
constexpr int kScorers = 128;   // threads that make scores
constexpr int kDepth = 32;      // channels of queries and keys that they share at a time
constexpr int kMaxWindow = 23;  // side of a window

// Rows of B x h and tiles of kCells columns: the place of a block.
struct WindowTile {
  int x, y;
  Int64 image;  // the number of its map's first cell
};

PMVIS_DEVICE WindowTile tile_of(int height, int width, int tile) {
  return {tile * kCells, static_cast<int>(blockIdx.y),
          static_cast<Int64>(blockIdx.z) * height * width};
}

// Sum and largest of a warp's lanes.
template <typename A>
PMVIS_DEVICE A warp_sum(A x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) x += from_lane(x, step);
  return x;
}
template <typename A>
PMVIS_DEVICE A warp_top(A x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const A other = from_lane(x, step);
    x = other > x ? other : x;
  }
  return x;
}

// A warp makes weights of a window's logits; those outside the map are marked by `there`.
template <typename A, typename There>
PMVIS_DEVICE void weigh(const A* scores, int area, int lane, const There& there, A* output) {
  const int middle = area / 2;  // a cell's own place is always there
  A top = scores[middle];
  for (int n = lane; n < area; n += 32) {
    if (there(n) && scores[n] > top) top = scores[n];
  }
  top = warp_top(top);
  A sum = A(0);
  for (int n = lane; n < area; n += 32) {
    if (there(n)) sum += exp(scores[n] - top);
  }
  sum = warp_sum(sum);
  for (int n = lane; n < area; n += 32) {
    output[n] = there(n) ? exp(scores[n] - top) / sum : A(0);
  }
}

// A warp makes the slopes of logits from those of their softmax.
template <typename A, typename There>
PMVIS_DEVICE void slope(const A* scores, const A* weights, int area, int lane, const There& there,
                        A* output) {
  A mean = A(0);
  for (int n = lane; n < area; n += 32) {
    if (there(n)) mean += weights[n] * scores[n];
  }
  mean = warp_sum(mean);
  for (int n = lane; n < area; n += 32) {
    output[n] = there(n) ? weights[n] * (scores[n] - mean) : A(0);
  }
}

// Queries and keys of a row, some channels of them.
template <typename A>
struct Slab {
  A queries[kCells][kDepth + 1];  // one more keeps rows apart in banks
  A keys[kCells + kMaxWindow - 1][kDepth + 1];
};

// Fetches channels [first, first + kDepth); zeros where there are none.
template <typename T>
PMVIS_DEVICE void fetch(const T* query, const T* key, const WindowTile& tile, int row, int width,
                        int channels, int side, int first, Slab<Sum<T>>* slab) {
  const int number = kCells + (kCells + side - 1);
  for (int n = threadIdx.x; n < number * kDepth; n += kScorers) {
    const int item = n / kDepth, c = n % kDepth;
    const bool asks = item < kCells;
    const int x = asks ? tile.x + item : tile.x - side / 2 + item - kCells;
    const bool works = x >= 0 && x < width && first + c < channels;
    const Int64 cell = tile.image + static_cast<Int64>(asks ? tile.y : row) * width + x;
    const Sum<T> number_there =
        works ? widen((asks ? query : key)[cell * channels + first + c]) : Sum<T>(0);
    (asks ? slab->queries[item] : slab->keys[item - kCells])[c] = number_there;
  }
}

// query, key (B, N, D) -> output (B, N, side^2): products with the cells of the windows, plus `terms`
// where there are any. Without weights these are logits, and become weights by a softmax; with weights
// (as the terms) they are the slopes of those, and become the slopes of the logits.
// Grid: tiles of kCells columns; h; B. Shared: kCells x side^2 of A.
template <typename T>
__global__ void __launch_bounds__(kScorers)
    window_scores(const T* query, const T* key, const Sum<T>* terms, const Sum<T>* weights,
                  Sum<T>* output, int height, int width, int channels, int side) {
  using A = Sum<T>;
  PMVIS_DYNAMIC_SHARED(room);
  __shared__ Slab<A> slab;
  A* scores = reinterpret_cast<A*>(room);
  const int area = side * side, radius = side / 2;
  const WindowTile tile = tile_of(height, width, blockIdx.x);
  const Int64 first_cell = tile.image + static_cast<Int64>(tile.y) * width + tile.x;
  for (int dy = 0; dy < side; ++dy) {
    const int row = tile.y + dy - radius;
    if (row < 0 || row >= height) continue;
    for (int start = 0; start < kCells * side; start += kScorers) {
      const int pair = start + threadIdx.x, i = pair / side, dx = pair % side;
      const bool works = i < kCells;
      A sum = A(0);
      for (int first = 0; first < channels; first += kDepth) {
        __syncthreads();
        fetch(query, key, tile, row, width, channels, side, first, &slab);
        __syncthreads();
        for (int c = 0; works && c < kDepth; ++c) sum += slab.queries[i][c] * slab.keys[i + dx][c];
      }
      if (!works) continue;
      const int at = i * area + dy * side + dx;
      const bool here = tile.x + i < width;
      scores[at] = terms != nullptr && here ? sum + terms[first_cell * area + at] : sum;
    }
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < kCells && tile.x + i < width; i += kScorers / 32) {
    const auto there = [&](int n) {
      const int y = tile.y + n / side - radius, x = tile.x + i + n % side - radius;
      return y >= 0 && y < height && x >= 0 && x < width;
    };
    const Int64 at = (first_cell + i) * area;
    if (weights == nullptr) {
      weigh(scores + i * area, area, lane, there, output + at);
    } else {
      slope(scores + i * area, weights + at, area, lane, there, output + at);
    }
  }
}

// values (B, N, C), weights (B, N, side^2) -> output (B, N, C): sums over windows of each cell's own
// weights or, gathering, of those that the cells of its window have for it.
// Grid: tiles of kCells columns x slices of N channels a thread; h; B. Shared: kCells x side x
// (kCells + side - 1) of A.
template <typename T, int N, bool gathers>
__global__ void __launch_bounds__(128)
    window_sums(const T* values, const Sum<T>* weights, T* output, int height, int width,
                int channels, int side) {
  using A = Sum<T>;
  PMVIS_DYNAMIC_SHARED(room);
  A* table = reinterpret_cast<A*>(room);  // by row, column of the tile's columns, cell
  const int area = side * side, radius = side / 2, columns = kCells + side - 1;
  const int threads = blockDim.x, tiles = (width + kCells - 1) / kCells;
  const WindowTile tile = tile_of(height, width, blockIdx.x % tiles);
  for (int n = threadIdx.x; n < side * columns * kCells; n += threads) {
    const int i = n % kCells, j = n / kCells % columns, dy = n / kCells / columns, dx = j - i;
    const int row = tile.y + dy - radius, x = tile.x + j - radius;
    const bool there = dx >= 0 && dx < side && row >= 0 && row < height && x >= 0 && x < width &&
                       tile.x + i < width;
    const Int64 other = tile.image + static_cast<Int64>(row) * width + x;
    const Int64 own = tile.image + static_cast<Int64>(tile.y) * width + tile.x + i;
    const int at = dy * side + dx;
    const Int64 place = gathers ? other * area + area - 1 - at : own * area + at;
    table[n] = there ? weights[place] : A(0);
  }
  __syncthreads();
  const int channel = (static_cast<int>(blockIdx.x) / tiles * threads + threadIdx.x) * N;
  if (channel >= channels) return;
  A sum[kCells][N] = {};
  const int begin = most(0, radius - tile.x), end = least(columns, width + radius - tile.x);
  for (int dy = most(0, radius - tile.y); dy < least(side, height + radius - tile.y); ++dy) {
    const Int64 start = tile.image + static_cast<Int64>(tile.y + dy - radius) * width + tile.x - radius;
    for (int j = begin; j < end; ++j) {
      A pixel[N];
      load<T, N>(values + (start + j) * channels + channel, pixel);
      const A* weight = table + (dy * columns + j) * kCells;
#pragma unroll
      for (int i = 0; i < kCells; ++i) {
#pragma unroll
        for (int n = 0; n < N; ++n) sum[i][n] += weight[i] * pixel[n];
      }
    }
  }
  const Int64 own = tile.image + static_cast<Int64>(tile.y) * width + tile.x;
#pragma unroll
  for (int i = 0; i < kCells; ++i) {
    if (tile.x + i < width) store<T, N>(output + (own + i) * channels + channel, sum[i]);
  }
}

}  // namespace pmvis
