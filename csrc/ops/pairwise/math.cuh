// What the kernels of images and of clips share: colours, a pair's
// term and slope, and sums over the tiles of an instance.
#pragma once

#include "ops/common/device.cuh"

namespace pmvis {

constexpr int kTileWidth = 32, kTileHeight = 8, kTile = kTileWidth * kTileHeight;

// Linear light of an sRGB byte (IEC 61966-2-1): x^2.4 is x^2 times the fifth root of x^2, which a
// step of Newton's in double takes far beyond float.
PMVIS_DEVICE float linear_light(int byte) {
  const double v = byte / 255.0;
  if (v <= 0.04045) return static_cast<float>(v / 12.92);
  const double x = (v + 0.055) / 1.055, square = x * x;
  const double root = powf(static_cast<float>(square), 0.2f), fourth = root * root * root * root;
  const double better = root - (fourth * root - square) / (5.0 * fourth);
  return static_cast<float>(square * better);
}

// CIE 1976 L*a*b* has this curve; the line keeps its slope finite at black. In double, because a and
// b are differences of its values times hundreds.
PMVIS_DEVICE double lab_curve(double x) {
  if (x <= 0.008856) return 7.787 * x + 16.0 / 116.0;
  const double root = cbrtf(static_cast<float>(x));
  return root - (root * root * root - x) / (3.0 * root * root);
}

PMVIS_DEVICE void lab_colour(float red, float green, float blue, float (&lab)[3]) {
  const double r = red, g = green, u = blue;
  // Each row is divided by the white point's X, Y or Z under illuminant D65.
  const double x = lab_curve((0.412453 * r + 0.357580 * g + 0.180423 * u) / 0.95047);
  const double y = lab_curve(0.212671 * r + 0.715160 * g + 0.072169 * u);
  const double z = lab_curve((0.019334 * r + 0.119193 * g + 0.950227 * u) / 1.08883);
  lab[0] = static_cast<float>(116.0 * y - 16.0);
  lab[1] = static_cast<float>(500.0 * (x - y));
  lab[2] = static_cast<float>(200.0 * (y - z));
}

// A logit with u = e^-|x| and tilt = tanh(x / 2).
template <typename T>
struct End {
  T logit, u, tilt;
};

template <typename T>
PMVIS_DEVICE End<T> end_of(T logit) {
  const T u = exp(-fabs(logit)), bend = (T(1) - u) / (T(1) + u);
  return {logit, u, logit < T(0) ? -bend : bend};
}

// A pair's term, and its slope towards the logit `a`.
template <typename T>
struct PairOf {
  T term, slope;
};

// Of logits of any size.
PMVIS_DEVICE PairOf<double> any_pair(double a, double b) {
  const double size_a = fabs(a), size_b = fabs(b), u = exp(-size_a), v = exp(-size_b);
  const double tilt = copysign((1 - v) / (1 + v), b);
  if ((a < 0) == (b < 0)) {
    const double odds = (u + v) / (1 + u * v);
    return {log1p(odds), -u / ((1 + u) * (1 + u)) * tilt * (1 + odds)};
  }
  // u / (u + v), however small both are.
  const double part = 1 / (1 + exp(size_a - size_b)), least = size_a < size_b ? size_a : size_b;
  return {least + log1p(u) + log1p(v) - log1p(exp(-fabs(size_a - size_b))),
          -part * (1 + v) / (1 + u) * tilt};
}

// With p and q the probabilities and same = p q + (1 - p)(1 - q), odds are (1 - same) / same, the term
// log(1 + odds) and its slope -p (1 - p) tilt' (1 + odds): all without cancellation.
template <typename T>
PMVIS_DEVICE PairOf<T> pair_of(const End<T>& a, const End<T>& b) {
  const T tame = sizeof(T) == 4 ? T(80) : T(700);
  if (!(fabs(a.logit) <= tame && fabs(b.logit) <= tame)) {  // also where one is no number
    const PairOf<double> pair = any_pair(a.logit, b.logit);
    return {static_cast<T>(pair.term), static_cast<T>(pair.slope)};
  }
  const T apart = a.u + b.u, close = T(1) + a.u * b.u;
  const T odds = a.tilt * b.tilt >= T(0) ? apart / close : close / apart;
  const T share = T(1) / (T(1) + a.u);
  return {log1p(odds), -a.u * share * share * b.tilt * (T(1) + odds)};
}

// Sums a number over the threads of a block, in one order; thread 0 gets it. `room`: one for a warp.
template <typename A>
PMVIS_DEVICE A block_sum(A x, A* room, int thread) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += from_lane(x, step);
  if (thread % 32 == 0) room[thread / 32] = x;
  __syncthreads();
  A sum = A(0);
  for (int warp = 0; thread == 0 && warp < kTile / 32; ++warp) sum += room[warp];
  __syncthreads();
  return sum;
}

// Sums of an instance's tiles, as T. Grid: N; kTile threads.
template <typename T>
__global__ void __launch_bounds__(kTile)
    pairwise_sums(const double* terms, const Int64* edges, int tiles, T* term, T* edge) {
  __shared__ double term_room[kTile / 32];
  __shared__ Int64 edge_room[kTile / 32];
  const Int64 first = static_cast<Int64>(blockIdx.x) * tiles;
  double total = 0.0;
  Int64 count = 0;
  for (int tile = threadIdx.x; tile < tiles; tile += kTile) {
    total += terms[first + tile];
    count += edges[first + tile];
  }
  total = block_sum(total, term_room, threadIdx.x);
  count = block_sum(count, edge_room, threadIdx.x);
  if (threadIdx.x == 0) {
    term[blockIdx.x] = static_cast<T>(total);
    edge[blockIdx.x] = static_cast<T>(count);
  }
}

}  // namespace pmvis
