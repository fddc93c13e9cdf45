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

#include "ops/deformable_attention/points.cuh"

namespace pmvis {

constexpr int kThreads = 128;
constexpr int kForwardPoints = 16;  // planned together
constexpr int kBackwardPoints = 8;
constexpr int kQueries = 4;
constexpr int kSlots = kQueries * kBackwardPoints;

// A point ready to be gathered; a corner outside has the weight 0 and some token.
template <typename A>
struct alignas(16) Corners {
  A weight[4];
  int token[4];
};

template <typename A>
PMVIS_DEVICE Corners<A> corners(const Level& level, const Point<A>& point,
                                const unsigned char* padding) {
  Corners<A> plan;
  corner_tokens(level, point.cell, padding, plan.token);
  const A along[2] = {A(1) - point.x, point.x}, down[2] = {A(1) - point.y, point.y};
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    plan.weight[c] = plan.token[c] < 0 ? A(0) : point.weight * down[c >> 1] * along[c & 1];
    plan.token[c] = most(plan.token[c], 0);
  }
  return plan;
}

// value (B, S, M, D) and the operands of a `Source`, fused or not -> output (B, Q, M, D).
// Grid: blocks of kThreads / G queries; B x M x (slices of G x N channels).
template <typename T, int N, int G, bool F>
__global__ void __launch_bounds__(kThreads)
    deformable_forward(const T* value, const Sum<T>* references, const Sum<T>* places,
                       const Sum<T>* scores, const unsigned char* padding, T* output, PMVIS_LEVELS,
                       int levels, int tokens, int heads, int channels, int queries, int points,
                       int size) {
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
  const unsigned char* hidden = F && padding != nullptr ? padding + batch * Int64{tokens} : nullptr;
  const Source<A> source{references, places, scores, hidden, levels, points, heads, size};
  const int number = levels * points;
  Softmax<A> softmax{};
  if constexpr (F) softmax = softmax_of<G>(source.logits(row), number, lane, query < queries);
  A sum[N] = {};
  for (int first = 0; first < number; first += kForwardPoints) {
    const int count = least(number - first, kForwardPoints);
    for (int i = lane; query < queries && i < count; i += G) {
      const Level level = table[(first + i) / points];
      const A score = scores[row * number + first + i];
      const Point<A> point = find<F>(source, level, row, first + i, F ? softmax(score) : score);
      plans[group][i] = corners(level, point, hidden);
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
  const unsigned char* padding;
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
    corner_tokens(level, to, padding, tokens);
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

// The gradients of a fused row's level, from slopes of the weights and, per pixel, of the places that
// lie where the gradients will: sums over points, so a lane does all of a level.
template <typename A>
PMVIS_DEVICE void finish_level(const Source<A>& source, const Level& level, Int64 row, int l,
                               const Softmax<A>& softmax, A mean, A* grad_references,
                               A* grad_places, A* grad_scores) {
  const A* reference = source.reference(row, l);
  A unit[2], sums[4] = {};
  offset_units(source, level, reference, unit);
  for (int p = 0; p < source.points; ++p) {
    const Int64 at = (row * source.levels + l) * source.points + p;
    grad_scores[at] = softmax(source.scores[at]) * (grad_scores[at] - mean);
#pragma unroll
    for (int axis = 0; axis < 2; ++axis) {
      const A slope = grad_places[2 * at + axis];
      sums[axis] += slope;
      sums[2 + axis] += slope * source.places[2 * at + axis];
      grad_places[2 * at + axis] = slope * unit[axis];
    }
  }
  if (grad_references == nullptr) return;
  const A share = A(0.5) / static_cast<A>(source.points);
  const A sides[2] = {static_cast<A>(level.columns), static_cast<A>(level.rows)};
  for (int r = 0; r < source.size; ++r) {
    grad_references[(row * source.levels + l) * source.size + r] =
        sums[r] * sides[r & 1] * (r < 2 ? A(1) : share);
  }
}

// What the lanes of a group share on the way back: a slot is a query's point.
template <typename A>
struct Group {
  Point<A> plan[kSlots + 1];  // one more keeps groups apart in banks
  Slopes<A> slopes[kSlots];
  Softmax<A> softmax[kQueries];
  A mean[kQueries];  // of the weights' slopes, by the weights

  // Finds the softmax of each query from `row` on, of which there are so many.
  template <int G>
  PMVIS_DEVICE void weigh(const Source<A>& source, Int64 row, int lane, int queries) {
    for (int k = 0; k < kQueries; ++k) {
      const A* logits = source.logits(row + k * Int64{source.heads});
      const int number = source.levels * source.points;
      const Softmax<A> one = softmax_of<G>(logits, number, lane, k < queries);
      if (lane == 0) softmax[k] = one;
    }
  }

  // Calls run(slot, query of the group, point after the first) for the lane's slots.
  template <int G, typename Run>
  PMVIS_DEVICE static void each(int lane, int queries, int count, const Run& run) {
    for (int slot = lane; slot < kSlots; slot += G) {
      const int k = slot / kBackwardPoints, i = slot % kBackwardPoints;
      if (k < queries && i < count) run(slot, k, i);
    }
  }
};

// Adds the slopes of `count` points of one level after the other, for the channels of this lane, and
// what value's gradient gets of them.
template <int G, typename T, int N, typename S>
PMVIS_DEVICE void walk(const Level* table, int points, int first, int count, int queries, int lane,
                       const Sum<T> (&output)[kQueries][N], Cell<T, N, S>* cell,
                       Group<Sum<T>>* group) {
  using A = Sum<T>;
  for (int i = 0; i < count; ++i) {
    const Level level = table[(first + i) / points];
    A by_weight[kQueries] = {}, by_x[kQueries] = {}, by_y[kQueries] = {};
    cell->start();
#pragma unroll
    for (int k = 0; k < kQueries; ++k) {
      if (k >= queries) continue;
      const Point<A> point = group->plan[k * kBackwardPoints + i];
      cell->move(level, point.cell);
      const Slopes<A> part = visit(cell, point, output[k]);
      by_weight[k] = part.weight;
      by_x[k] = part.x;
      by_y[k] = part.y;
    }
    cell->finish();
    __syncwarp();
    const A of_weight = group_sum<G>(by_weight, lane);
    const A of_x = group_sum<G>(by_x, lane), of_y = group_sum<G>(by_y, lane);
    if (lane < kQueries) {
      Slopes<A>* sum = &group->slopes[lane * kBackwardPoints + i];
      *sum = {sum->weight + of_weight, sum->x + of_x, sum->y + of_y};
    }
  }
}

// grad (B, Q, M, D) and what went forward -> sums of value's gradient, which must be 0 before and are
// A or, where `bound` is what none exceeds, whole multiples of 1 / fixed_scale; the other gradients,
// that of the references (B, Q, M, L, R) being each head's share, or nullptr where nobody asks.
// Grid: blocks of kQueries x kThreads / G queries; B x M.
template <typename T, typename S, int N, int G, bool F>
__global__ void __launch_bounds__(kThreads)
    deformable_backward(const T* grad, const T* value, const Sum<T>* references,
                        const Sum<T>* places, const Sum<T>* scores, const unsigned char* padding,
                        const Sum<T>* bound, S* grad_value, Sum<T>* grad_references,
                        Sum<T>* grad_places, Sum<T>* grad_scores, PMVIS_LEVELS, int levels,
                        int tokens, int heads, int channels, int queries, int points, int size) {
  using A = Sum<T>;
  __shared__ Level table[kMaxLevels];
  __shared__ Group<A> groups[kThreads / G];
  PMVIS_READ_LEVELS(table);
  Group<A>* group = &groups[threadIdx.x / G];
  const int lane = threadIdx.x % G;
  const int first_query = (blockIdx.x * (kThreads / G) + threadIdx.x / G) * kQueries;
  const int here = least(queries - first_query, kQueries);  // of this group; none if negative
  const int batch = blockIdx.y / heads, m = blockIdx.y % heads, number = levels * points;
  const Int64 stride = static_cast<Int64>(heads) * channels;
  const Int64 row = (static_cast<Int64>(batch) * queries + first_query) * heads + m;
  const Int64 origin = batch * (tokens * stride) + m * channels;
  Cell<T, N, S> cell;
  cell.stride = stride;
  cell.padding = F && padding != nullptr ? padding + batch * Int64{tokens} : nullptr;
  cell.scale = bound != nullptr ? fixed_scale(static_cast<double>(*bound)) : 0.0;
  const Source<A> source{references, places, scores, cell.padding, levels, points, heads, size};
  if constexpr (F) {
    group->template weigh<G>(source, row, lane, here);
    __syncwarp();
  }
  A mean = A(0);  // of the query that this lane looks after
  for (int first = 0; first < number; first += kBackwardPoints) {
    const int count = least(number - first, kBackwardPoints);
    Group<A>::template each<G>(lane, here, count, [&](int slot, int k, int i) {
      const Int64 at = row + k * Int64{heads};
      const A score = scores[at * number + first + i];
      group->plan[slot] = find<F>(source, table[(first + i) / points], at, first + i,
                                  F ? group->softmax[k](score) : score);
      group->slopes[slot] = {A(0), A(0), A(0)};
    });
    __syncwarp();
    for (int slice = 0; slice < channels; slice += G * N) {
      const int channel = slice + lane * N;
      const bool works = channel < channels;
      cell.value = value + origin + channel;
      cell.gradient = grad_value + origin + channel;
      A output[kQueries][N] = {};
#pragma unroll
      for (int k = 0; k < kQueries; ++k) {
        if (works && k < here) {
          load<T, N>(grad + (row + k * Int64{heads}) * channels + channel, output[k]);
        }
      }
      walk<G>(table, points, first, count, works ? here : 0, lane, output, &cell, group);
    }
    __syncwarp();
    for (int i = 0; F && lane < here && i < count; ++i) {
      const int slot = lane * kBackwardPoints + i;
      mean += group->plan[slot].weight * group->slopes[slot].weight;
    }
    Group<A>::template each<G>(lane, here, count, [&](int slot, int k, int i) {
      const Int64 at = (row + k * Int64{heads}) * number + first + i;
      const Level level = table[(first + i) / points];
      const A weight = group->plan[slot].weight;
      const Slopes<A> sum = group->slopes[slot];
      grad_scores[at] = sum.weight;
      grad_places[2 * at] = weight * (F ? A(1) : static_cast<A>(level.columns)) * sum.x;
      grad_places[2 * at + 1] = weight * (F ? A(1) : static_cast<A>(level.rows)) * sum.y;
    });
    __syncwarp();
  }
  if constexpr (F) {
    if (lane < kQueries) group->mean[lane] = mean;
    __syncwarp();  // what other lanes wrote of the gradients is seen as well
    for (int item = lane; item < kQueries * levels; item += G) {
      const int k = item / levels, l = item % levels;
      if (k >= here) continue;
      finish_level(source, table[l], row + k * Int64{heads}, l, group->softmax[k], group->mean[k],
                   grad_references, grad_places, grad_scores);
    }
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
