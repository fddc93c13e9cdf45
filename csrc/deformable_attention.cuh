// Multi-scale deformable attention on the GPU (arXiv:2010.04159, Eq. 2 and 3).
//
// A group of G lanes serves a query and a head, N channels a lane. Its lanes first plan the points
// together, in shared memory, then each gathers its channels of every point. Blocks hold neighbouring
// queries of one head, which look at nearly the same places.
//
// Backward, a group serves kQueries neighbouring queries: it walks along them, one point of the plan
// at a time, with the four corners of the cell it stands on in registers. While the cell stays (coarse
// levels) nothing is added to memory; when it moves one column (the finest level) only its left side
// is. Slopes of places and weights need no such sums, and are always the same to the bit.
#pragma once

#include "device.cuh"

namespace pmvis {

constexpr int kThreads = 128;
constexpr int kMaxLevels = 8;
constexpr int kForwardPoints = 16;  // planned together
constexpr int kBackwardPoints = 8;
constexpr int kQueries = 4;
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

template <typename A>
PMVIS_DEVICE Point<A> place(const Level& level, const A* location, A weight) {
  const A x = location[0] * static_cast<A>(level.columns) - A(0.5);
  const A y = location[1] * static_cast<A>(level.rows) - A(0.5);
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

// Tokens of the corners, -1 where there is none: upper left, upper right, lower left, lower right.
PMVIS_DEVICE void corner_tokens(const Level& level, Word cell, int (&tokens)[4]) {
  const int row = static_cast<int>(cell >> 16) - 1, column = static_cast<int>(cell & 0xffff) - 1;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int y = row + (c >> 1), x = column + (c & 1);
    const bool inside = y >= 0 && y < level.rows && x >= 0 && x < level.columns;
    tokens[c] = inside ? level.start + y * level.columns + x : -1;
  }
}

// A point ready to be gathered; a corner outside has the weight 0 and some token.
template <typename A>
struct alignas(16) Corners {
  A weight[4];
  int token[4];
};

template <typename A>
PMVIS_DEVICE Corners<A> corners(const Level& level, const A* location, A weight) {
  const Point<A> point = place(level, location, weight);
  Corners<A> plan;
  corner_tokens(level, point.cell, plan.token);
  const A along[2] = {A(1) - point.x, point.x}, down[2] = {A(1) - point.y, point.y};
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    plan.weight[c] = plan.token[c] < 0 ? A(0) : point.weight * down[c >> 1] * along[c & 1];
    plan.token[c] = most(plan.token[c], 0);
  }
  return plan;
}

// value (B, S, M, D), locations (B, Q, M, L, P, 2), weights (B, Q, M, L, P) -> output (B, Q, M, D).
// Grid: blocks of kThreads / G queries; B x M x (slices of G x N channels).
template <typename T, int N, int G>
__global__ void __launch_bounds__(kThreads)
    deformable_forward(const T* value, const Sum<T>* locations, const Sum<T>* weights, T* output,
                       PMVIS_LEVELS, int levels, int tokens, int heads, int channels, int queries,
                       int points) {
  using A = Sum<T>;
  constexpr int kGroups = kThreads / G;
  __shared__ Level table[kMaxLevels];
  __shared__ Corners<A> plans[kGroups][kForwardPoints + 1];  // one more keeps groups apart in banks
  PMVIS_READ_LEVELS(table);
  const int group = threadIdx.x / G, lane = threadIdx.x % G;
  const int query = blockIdx.x * kGroups + group;
  const int slices = (channels + G * N - 1) / (G * N);
  const int head = blockIdx.y / slices, channel = (blockIdx.y % slices * G + lane) * N;
  const int batch = head / heads, m = head % heads;
  const bool works = query < queries && channel < channels;
  const Int64 row = (static_cast<Int64>(batch) * queries + query) * heads + m;
  const Int64 stride = static_cast<Int64>(heads) * channels;
  const T* from = value + batch * (tokens * stride) + m * channels + channel;
  const int number = levels * points;
  A sum[N] = {};
  for (int first = 0; first < number; first += kForwardPoints) {
    const int count = least(number - first, kForwardPoints);
    for (int i = lane; query < queries && i < count; i += G) {
      const Int64 at = row * number + first + i;
      plans[group][i] = corners(table[(first + i) / points], locations + 2 * at, weights[at]);
    }
    __syncwarp();
    if (works) {
#pragma unroll 2
      for (int i = 0; i < count; ++i) {
        const Corners<A> plan = plans[group][i];
        A pixel[4][N];
#pragma unroll
        for (int c = 0; c < 4; ++c) load<T, N>(from + plan.token[c] * stride, pixel[c]);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
          for (int n = 0; n < N; ++n) sum[n] += plan.weight[c] * pixel[c][n];
        }
      }
    }
    __syncwarp();
  }
  if (works) store<T, N>(output + row * channels + channel, sum);
}

// The cell that a group stands on: its pixels, and what is to be added to their gradients.
template <typename T, int N, typename S>
struct Cell {
  using A = Sum<T>;
  const T* value;
  S* gradient;
  Int64 stride;
  double scale;
  Word here;
  int tokens[4];
  A pixel[4][N] = {}, sum[4][N] = {};

  PMVIS_DEVICE void leave(int c) {
    if (tokens[c] >= 0) add_to(gradient + tokens[c] * stride, sum[c], scale);
  }
  PMVIS_DEVICE void enter(int c) {
#pragma unroll
    for (int n = 0; n < N; ++n) pixel[c][n] = sum[c][n] = A(0);
    if (tokens[c] >= 0) load<T, N>(value + tokens[c] * stride, pixel[c]);
  }
  PMVIS_DEVICE void start() {
    here = ~0u;
#pragma unroll
    for (int c = 0; c < 4; ++c) tokens[c] = -1;
  }
  PMVIS_DEVICE void move(const Level& level, Word to) {
    if (to == here) return;
    const bool right = here != ~0u && to == here + 1;
    leave(0);
    leave(2);
    if (right) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        pixel[0][n] = pixel[1][n];
        pixel[2][n] = pixel[3][n];
        sum[0][n] = sum[1][n];
        sum[2][n] = sum[3][n];
      }
    } else {
      leave(1);
      leave(3);
    }
    here = to;
    corner_tokens(level, to, tokens);
    if (!right) {
      enter(0);
      enter(2);
    }
    enter(1);
    enter(3);
  }
  PMVIS_DEVICE void finish() {
#pragma unroll
    for (int c = 0; c < 4; ++c) leave(c);
  }
};

// Slopes of a point's weight and place, before the place's are scaled.
template <typename A>
struct Slopes {
  A weight, x, y;
};

// Adds a query's share to the cell; returns this lane's part of the slopes.
template <typename T, int N, typename S>
PMVIS_DEVICE Slopes<Sum<T>> visit(Cell<T, N, S>* cell, const Point<Sum<T>>& point,
                                  const Sum<T> (&grad)[N]) {
  using A = Sum<T>;
  const A along[2] = {A(1) - point.x, point.x}, down[2] = {A(1) - point.y, point.y};
  A dot[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const A share = point.weight * down[c >> 1] * along[c & 1];
    dot[c] = A(0);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      dot[c] += grad[n] * cell->pixel[c][n];
      cell->sum[c][n] += share * grad[n];
    }
  }
  return {down[0] * (along[0] * dot[0] + along[1] * dot[1]) +
              down[1] * (along[0] * dot[2] + along[1] * dot[3]),
          down[0] * (dot[1] - dot[0]) + down[1] * (dot[3] - dot[2]),
          along[0] * (dot[2] - dot[0]) + along[1] * (dot[3] - dot[1])};
}

// Sums four values over the lanes of a group at once: lane l gets the sum of value l % 4.
template <int G, typename A>
PMVIS_DEVICE A group_sum(const A (&x)[4], int lane) {
  const bool upper = (lane & 2) != 0, odd = (lane & 1) != 0;
  const A a = (upper ? x[2] : x[0]) + from_lane(upper ? x[0] : x[2], 2);
  const A b = (upper ? x[3] : x[1]) + from_lane(upper ? x[1] : x[3], 2);
  A sum = (odd ? b : a) + from_lane(odd ? a : b, 1);
#pragma unroll
  for (int step = 4; step < G; step *= 2) sum += from_lane(sum, step);
  return sum;
}

// Multiples in which gradients are summed, so that no sum up to `bound` leaves 62 bits.
PMVIS_DEVICE double fixed_scale(double bound) {
  int exponent = 0;
  frexp(bound, &exponent);
  return isfinite(bound) ? ldexp(1.0, least(most(61 - exponent, -900), 900)) : 0.0;
}

// grad (B, Q, M, D) and what went forward -> sums of value's gradient, which must be 0 before and are
// A or, where `bound` is what none exceeds, whole multiples of 1 / fixed_scale; the other gradients.
// Grid: blocks of kQueries x kThreads / G queries; B x M.
template <typename T, typename S, int N, int G>
__global__ void __launch_bounds__(kThreads)
    deformable_backward(const T* grad, const T* value, const Sum<T>* locations,
                        const Sum<T>* weights, const Sum<T>* bound, S* grad_value,
                        Sum<T>* grad_locations, Sum<T>* grad_weights, PMVIS_LEVELS, int levels,
                        int tokens, int heads, int channels, int queries, int points) {
  using A = Sum<T>;
  constexpr int kGroups = kThreads / G, kSlots = kQueries * kBackwardPoints;
  __shared__ Level table[kMaxLevels];
  __shared__ Point<A> plans[kGroups][kSlots + 1];
  __shared__ Slopes<A> slopes[kGroups][kSlots];
  PMVIS_READ_LEVELS(table);
  const int group = threadIdx.x / G, lane = threadIdx.x % G;
  const int first_query = (blockIdx.x * kGroups + group) * kQueries;
  const int batch = blockIdx.y / heads, m = blockIdx.y % heads;
  const Int64 stride = static_cast<Int64>(heads) * channels;
  const Int64 row = (static_cast<Int64>(batch) * queries + first_query) * heads + m;
  const Int64 origin = batch * (tokens * stride) + m * channels;
  const int number = levels * points;
  Cell<T, N, S> cell;
  cell.stride = stride;
  cell.scale = bound != nullptr ? fixed_scale(static_cast<double>(*bound)) : 0.0;
  for (int first = 0; first < number; first += kBackwardPoints) {
    const int count = least(number - first, kBackwardPoints);
    for (int slot = lane; slot < kSlots; slot += G) {
      const int k = slot / kBackwardPoints, i = slot % kBackwardPoints;
      if (first_query + k >= queries || i >= count) continue;
      const Int64 at = (row + static_cast<Int64>(k) * heads) * number + first + i;
      plans[group][slot] = place(table[(first + i) / points], locations + 2 * at, weights[at]);
      slopes[group][slot] = {A(0), A(0), A(0)};
    }
    __syncwarp();
    for (int slice = 0; slice < channels; slice += G * N) {
      const int channel = slice + lane * N;
      const bool works = channel < channels;
      cell.value = value + origin + channel;
      cell.gradient = grad_value + origin + channel;
      A output[kQueries][N] = {};
#pragma unroll
      for (int k = 0; k < kQueries; ++k) {
        if (works && first_query + k < queries) {
          load<T, N>(grad + (row + static_cast<Int64>(k) * heads) * channels + channel, output[k]);
        }
      }
      for (int i = 0; i < count; ++i) {
        const Level level = table[(first + i) / points];
        A by_weight[kQueries] = {}, by_x[kQueries] = {}, by_y[kQueries] = {};
        cell.start();
#pragma unroll
        for (int k = 0; k < kQueries; ++k) {
          if (!works || first_query + k >= queries) continue;
          const Point<A> point = plans[group][k * kBackwardPoints + i];
          cell.move(level, point.cell);
          const Slopes<A> part = visit(&cell, point, output[k]);
          by_weight[k] = part.weight;
          by_x[k] = part.x;
          by_y[k] = part.y;
        }
        cell.finish();
        __syncwarp();
        const A of_weight = group_sum<G>(by_weight, lane);
        const A of_x = group_sum<G>(by_x, lane), of_y = group_sum<G>(by_y, lane);
        if (lane < kQueries) {
          Slopes<A>* sum = &slopes[group][lane * kBackwardPoints + i];
          *sum = {sum->weight + of_weight, sum->x + of_x, sum->y + of_y};
        }
      }
    }
    __syncwarp();
    for (int slot = lane; slot < kSlots; slot += G) {
      const int k = slot / kBackwardPoints, i = slot % kBackwardPoints;
      if (first_query + k >= queries || i >= count) continue;
      const Int64 at = (row + static_cast<Int64>(k) * heads) * number + first + i;
      const Level level = table[(first + i) / points];
      const A weight = plans[group][slot].weight;
      const Slopes<A> sum = slopes[group][slot];
      grad_weights[at] = sum.weight;
      grad_locations[2 * at] = weight * static_cast<A>(level.columns) * sum.x;
      grad_locations[2 * at + 1] = weight * static_cast<A>(level.rows) * sum.y;
    }
    __syncwarp();
  }
}

// n sums as T.
template <typename T, typename S>
__global__ void __launch_bounds__(256)
    deformable_round(const S* sums, const Sum<T>* bound, T* output, Int64 n) {
  const double largest = bound != nullptr ? static_cast<double>(*bound) : 0.0;
  // Not a division by the scale where that is 0: what is no number stays none.
  const double unit = isfinite(largest) ? 1.0 / fixed_scale(largest) : largest - largest;
  const Int64 steps = static_cast<Int64>(gridDim.x) * blockDim.x;
  for (Int64 i = static_cast<Int64>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += steps) {
    const Sum<T> sum = bound != nullptr ? static_cast<Sum<T>>(static_cast<double>(sums[i]) * unit)
                                        : static_cast<Sum<T>>(sums[i]);
    narrow(sum, output + i);
  }
}

}  // namespace pmvis
