// Colour affinity and BoxInst's pairwise loss on the GPU (arXiv:2012.02310, section 3.2). Neighbours
// are counted row by row, the centre left out.
//
// Every pixel meets all its neighbours and adds up its own share of gradient, terms and edges: each
// pair is computed at both ends, so nothing is added to memory by several threads and results are
// always the same to the bit.
#pragma once

#include "ops/pairwise/math.cuh"

namespace pmvis {

constexpr int kColourRows = 16;    // of pixels of a tile of the affinity
constexpr int kMaxColourReach = 16;  // radius x dilation: the tile with its surroundings is shared
constexpr int kMaxPairDilation = 8;

// images (B, 3, H, W) -> similarity (B, K, H, W). Grid: tiles of kTileWidth x kColourRows, B; threads
// kTileWidth x kTileHeight; three floats for each pixel of the tile widened by radius x dilation.
__global__ void __launch_bounds__(kTile)
    lab_similarity(const unsigned char* images, float* similarity, int height, int width,
                   int radius, int dilation) {
  PMVIS_DYNAMIC_SHARED(memory);
  __shared__ float linear[256];
  float* lab = reinterpret_cast<float*>(memory);
  const int reach = radius * dilation, columns = kTileWidth + 2 * reach;
  const int cells = columns * (kColourRows + 2 * reach);
  const int left = blockIdx.x * kTileWidth, top = blockIdx.y * kColourRows;
  const int thread = threadIdx.y * kTileWidth + threadIdx.x;
  const Int64 area = static_cast<Int64>(height) * width;
  const unsigned char* image = images + blockIdx.z * 3 * area;
  linear[thread] = linear_light(thread);
  __syncthreads();
  for (int cell = thread; cell < cells; cell += kTile) {
    const int y = top + cell / columns - reach, x = left + cell % columns - reach;
    float colour[3] = {0.0f, 0.0f, 0.0f};
    if (y >= 0 && y < height && x >= 0 && x < width) {
      const Int64 at = static_cast<Int64>(y) * width + x;
      lab_colour(linear[image[at]], linear[image[at + area]], linear[image[at + 2 * area]], colour);
    }
    for (int c = 0; c < 3; ++c) lab[c * cells + cell] = colour[c];
  }
  __syncthreads();
  const int side = 2 * radius + 1, x = left + threadIdx.x;
  float* output = similarity + blockIdx.z * (side * side - 1) * area;
  for (int row = threadIdx.y; row < kColourRows && x < width; row += kTileHeight) {
    const int y = top + row, here = (row + reach) * columns + threadIdx.x + reach;
    if (y >= height) break;
    for (int k = 0; k < side * side - 1; ++k) {
      const int window = k + (k >= side * side / 2);
      const int there = here + ((window / side - radius) * columns + window % side - radius) * dilation;
      float square = 0.0f;
      for (int c = 0; c < 3; ++c) {
        const float d = lab[c * cells + here] - lab[c * cells + there];
        square += d * d;
      }
      output[k * area + static_cast<Int64>(y) * width + x] = expf(-0.5f * sqrtf(square));
    }
  }
}

// Row and column steps of the eight neighbours.
PMVIS_DEVICE int step_y(int k) { return (k + (k >= 4)) / 3 - 1; }
PMVIS_DEVICE int step_x(int k) { return (k + (k >= 4)) % 3 - 1; }

// Bit k of asks (B, H, W): the pixel may ask for the agreement of neighbour k. `valid` may be null.
// Grid: tiles, B.
__global__ void __launch_bounds__(kTile)
    asked_neighbours(const float* similarity, const unsigned char* valid, unsigned char* asks,
                     float threshold, int height, int width, int dilation) {
  const int x = blockIdx.x * kTileWidth + threadIdx.x, y = blockIdx.y * kTileHeight + threadIdx.y;
  if (x >= width || y >= height) return;
  const Int64 area = static_cast<Int64>(height) * width, at = static_cast<Int64>(y) * width + x;
  int bits = 0;
  for (int k = 0; k < 8; ++k) {
    const int v = y + step_y(k) * dilation, u = x + step_x(k) * dilation;
    if (v < 0 || v >= height || u < 0 || u >= width) continue;
    const bool good =
        valid == nullptr || valid[blockIdx.z * area + static_cast<Int64>(v) * width + u] != 0;
    bits |= (good && similarity[(blockIdx.z * 8 + k) * area + at] >= threshold) << k;
  }
  asks[blockIdx.z * area + at] = static_cast<unsigned char>(bits);
}

// logits (N, H, W), asks (B, H, W), image (N,), cells (N, 4) x0, y0, x1, y1 -> gradient (N, H, W) of
// the terms, or null, and sums of terms and edges of every tile. Grid: tiles, N; an End for each
// pixel of the tile widened by the dilation.
template <typename T>
__global__ void __launch_bounds__(kTile)
    pairwise_tiles(const T* logits, const unsigned char* asks, const Int64* image,
                   const Int64* cells, T* gradient, double* terms, Int64* edges, int images,
                   int height, int width, int dilation) {
  PMVIS_DYNAMIC_SHARED(memory);
  __shared__ double term_room[kTile / 32];
  __shared__ Int64 edge_room[kTile / 32];
  End<T>* ends = reinterpret_cast<End<T>*>(memory);
  const int n = blockIdx.z, thread = threadIdx.y * kTileWidth + threadIdx.x;
  const int left = blockIdx.x * kTileWidth, top = blockIdx.y * kTileHeight;
  const int x = left + threadIdx.x, y = top + threadIdx.y;
  const Int64 area = static_cast<Int64>(height) * width, frame = image[n];
  const int x0 = most(static_cast<int>(cells[4 * n]), 0);
  const int y0 = most(static_cast<int>(cells[4 * n + 1]), 0);
  const int x1 = least(static_cast<int>(cells[4 * n + 2]), width);
  const int y1 = least(static_cast<int>(cells[4 * n + 3]), height);
  const bool known = frame >= 0 && frame < images;
  const bool touched = known && x0 < x1 && y0 < y1 && left < x1 + dilation &&
                       left + kTileWidth + dilation > x0 && top < y1 + dilation &&
                       top + kTileHeight + dilation > y0;
  T term = known ? T(0) : static_cast<T>(nan("")), slope = T(0);
  Int64 number = 0;
  if (touched) {
    const int columns = kTileWidth + 2 * dilation;
    const int all = columns * (kTileHeight + 2 * dilation);
    for (int cell = thread; cell < all; cell += kTile) {
      const int v = top + cell / columns - dilation, u = left + cell % columns - dilation;
      const bool inside = v >= 0 && v < height && u >= 0 && u < width;
      ends[cell] = end_of(inside ? logits[n * area + static_cast<Int64>(v) * width + u] : T(0));
    }
    __syncthreads();
    const unsigned char* asking = asks + frame * area;
    const int here = (threadIdx.y + dilation) * columns + threadIdx.x + dilation;
    const bool boxed = x >= x0 && x < x1 && y >= y0 && y < y1;
    const int mine = boxed ? asking[static_cast<Int64>(y) * width + x] : 0;
    number = __popc(mine);
    for (int k = 0; k < 8 && x < width && y < height; ++k) {
      const int v = y + step_y(k) * dilation, u = x + step_x(k) * dilation;
      const bool theirs = u >= x0 && u < x1 && v >= y0 && v < y1 &&
                          (asking[static_cast<Int64>(v) * width + u] >> (7 - k) & 1) != 0;
      const int asked = mine >> k & 1;
      if (asked == 0 && !theirs) continue;
      const int there = here + (step_y(k) * columns + step_x(k)) * dilation;
      const PairOf<T> pair = pair_of(ends[here], ends[there]);
      if (asked != 0) term += pair.term;
      slope += static_cast<T>(asked + theirs) * pair.slope;
    }
  }
  if (gradient != nullptr && x < width && y < height) {
    gradient[n * area + static_cast<Int64>(y) * width + x] = slope;
  }
  const Int64 tile =
      (static_cast<Int64>(n) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const double total = block_sum(static_cast<double>(term), term_room, thread);
  const Int64 count = block_sum(number, edge_room, thread);
  if (thread == 0) {
    terms[tile] = total;
    edges[tile] = count;
  }
}

}  // namespace pmvis
