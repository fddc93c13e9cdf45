// Multi-scale deformable attention on the CPU: what the kernels take, and the two builds of them.
#pragma once

#include <cstdint>

namespace pmvis {

// Most sampling points (levels x points) of one query and head.
constexpr int kMaxPoints = 256;

// One call; arrays are contiguous. B batch, S tokens, M heads, D channels, Q queries, L levels,
// P points.
template <typename T>
struct Attention {
  const T* value;         // (B, S, M, D)
  const int64_t* shapes;  // (L, 2) height, width; every one positive, areas summing to S < 2^31
  const T* locations;     // (B, Q, M, L, P, 2) xy in [0, 1]
  const T* weights;       // (B, Q, M, L, P)
  int64_t batch, tokens, heads, channels, queries, levels, points;
};

template <typename T>
struct Gradients {
  const T* output;  // (B, Q, M, D), given
  T* value;         // written, as are the others
  T* locations;
  T* weights;
};

// forward: rows [begin, end) of B x M x Q, in that order, into output (B, Q, M, D).
// backward: whole heads [begin, end) of B x M; a head is owned by one call, so sums never depend
// on the number of threads.
#define PMVIS_DECLARE(T)                                                             \
  void forward(const Attention<T>& call, T* output, int64_t begin, int64_t end);     \
  void backward(const Attention<T>& call, const Gradients<T>& gradients, int64_t begin, int64_t end);

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
