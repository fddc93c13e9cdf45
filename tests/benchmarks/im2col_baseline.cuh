// The formulation to beat: deformable attention with a thread for each channel, as Deformable DETR
// describes its im2col kernels. Every thread works its samples out for itself and reads one channel at
// a time; backward, each adds to memory once a channel, corner and sample.
#include "ops/deformable_attention/kernels.cuh"

namespace baseline {

using namespace pmvis;

template <typename T>
PMVIS_DEVICE float pixel(const T* map, const Level& level, Int64 stride, int y, int x) {
  if (y < 0 || y >= level.rows || x < 0 || x >= level.columns) return 0.0f;
  return widen(map[(level.start + static_cast<Int64>(y) * level.columns + x) * stride]);
}

// Grid: B x Q x M blocks of D threads, as many as a warp or more.
template <typename T>
__global__ void forward(const T* value, const float* locations, const float* weights, T* output,
                        PMVIS_LEVELS, int levels, int tokens, int heads, int channels, int queries,
                        int points) {
  __shared__ Level table[kMaxLevels];
  PMVIS_READ_LEVELS(table);
  const Int64 row = blockIdx.x, stride = static_cast<Int64>(heads) * channels;
  const Int64 batch = row / heads / queries, m = row % heads;
  const T* map = value + batch * tokens * stride + m * channels + threadIdx.x;
  float sum = 0.0f;
  for (int i = 0; i < levels * points; ++i) {
    const Level level = table[i / points];
    const Int64 at = row * levels * points + i;
    const float x = locations[2 * at] * level.columns - 0.5f;
    const float y = locations[2 * at + 1] * level.rows - 0.5f;
    if (!(x > -1.0f && y > -1.0f && x < level.columns && y < level.rows)) continue;
    const int left = static_cast<int>(floorf(x)), top = static_cast<int>(floorf(y));
    const float u = x - left, v = y - top;
    sum += weights[at] * ((1 - v) * ((1 - u) * pixel(map, level, stride, top, left) +
                                     u * pixel(map, level, stride, top, left + 1)) +
                          v * ((1 - u) * pixel(map, level, stride, top + 1, left) +
                               u * pixel(map, level, stride, top + 1, left + 1)));
  }
  narrow(sum, output + row * channels + threadIdx.x);
}

// Slopes of places and weights are summed over the block's channels in shared memory.
template <typename T>
__global__ void backward(const T* grad, const T* value, const float* locations,
                         const float* weights, float* grad_value, float* grad_locations,
                         float* grad_weights, PMVIS_LEVELS, int levels, int tokens, int heads,
                         int channels, int queries, int points) {
  __shared__ Level table[kMaxLevels];
  __shared__ float room[3][1024];
  PMVIS_READ_LEVELS(table);
  const Int64 row = blockIdx.x, stride = static_cast<Int64>(heads) * channels;
  const Int64 batch = row / heads / queries, m = row % heads;
  const Int64 origin = batch * tokens * stride + m * channels + threadIdx.x;
  const float slope = widen(grad[row * channels + threadIdx.x]);
  for (int i = 0; i < levels * points; ++i) {
    const Level level = table[i / points];
    const Int64 at = row * levels * points + i;
    const float x = locations[2 * at] * level.columns - 0.5f;
    const float y = locations[2 * at + 1] * level.rows - 0.5f;
    float by_weight = 0.0f, by_x = 0.0f, by_y = 0.0f;
    if (x > -1.0f && y > -1.0f && x < level.columns && y < level.rows) {
      const int left = static_cast<int>(floorf(x)), top = static_cast<int>(floorf(y));
      const float along[2] = {1 - (x - left), x - left}, down[2] = {1 - (y - top), y - top};
      for (int c = 0; c < 4; ++c) {
        const int v = top + (c >> 1), u = left + (c & 1);
        const float dot = slope * pixel(value + origin, level, stride, v, u);
        by_weight += down[c >> 1] * along[c & 1] * dot;
        by_x += ((c & 1) ? 1.0f : -1.0f) * down[c >> 1] * dot;
        by_y += ((c >> 1) ? 1.0f : -1.0f) * along[c & 1] * dot;
        if (v < 0 || v >= level.rows || u < 0 || u >= level.columns) continue;
        const Int64 token = level.start + static_cast<Int64>(v) * level.columns + u;
        atomicAdd(grad_value + origin + token * stride,
                  weights[at] * down[c >> 1] * along[c & 1] * slope);
      }
    }
    room[0][threadIdx.x] = by_weight;
    room[1][threadIdx.x] = by_x;
    room[2][threadIdx.x] = by_y;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) {
        for (int k = 0; k < 3; ++k) room[k][threadIdx.x] += room[k][threadIdx.x + half];
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      grad_weights[at] = room[0][0];
      grad_locations[2 * at] = weights[at] * level.columns * room[1][0];
      grad_locations[2 * at + 1] = weights[at] * level.rows * room[2][0];
    }
    __syncthreads();
  }
}

}  // namespace baseline
