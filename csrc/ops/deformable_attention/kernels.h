// Multi-scale deformable attention on the CPU: what the kernels take, and the two builds of them.
#pragma once

#include <cstdint>

namespace pmvis {

// Most sampling points (levels x points) of one query and head.
constexpr int kMaxPoints = 256;

// One call; arrays are contiguous. B batch, S tokens, M heads, D channels, Q queries, L levels,
// P points. Without references places are xy in [0, 1] of a level and scores are weights. With them
// places are offsets and scores logits whose softmax over L x P weighs: offsets round a point are
// cells of the level, and those round a box (R = 4) halves of its sides divided by P.
template <typename T>
struct Attention {
  const T* value;         // (B, S, M, D), or packed: (B, M, S, D)
  const int64_t* shapes;  // (L, 2) height, width; every one positive, areas summing to S < 2^31
  const T* references;    // (B, Q, L, R) xy or cxcywh in [0, 1], or nullptr
  const T* places;        // (B, Q, M, L, P, 2)
  const T* scores;        // (B, Q, M, L, P)
  int64_t batch, tokens, heads, channels, queries, levels, points, reference_size;
  bool packed;

  // Elements from a token to the next, and up to the first one of a head of B x M.
  int64_t stride() const { return packed ? channels : heads * channels; }
  int64_t origin(int64_t head) const {
    return packed ? head * tokens * channels
                  : (head / heads * tokens * heads + head % heads) * channels;
  }
};

template <typename T>
struct Gradients {
  const T* output;  // (B, Q, M, D), given
  T* value;         // laid out as the call's; written, as are the others
  T* references;    // (B, Q, M, L, R), each head's share; nullptr where nobody asks
  T* places;
  T* scores;
};

// copy_tokens: tokens [begin, end) of B x S from (B, S, M, D) to (B, M, S, D) or, unpacking, back;
// zeros where `padding` (B, S), if there is any, is not 0.
// forward: rows [begin, end) of B x M x Q, in that order, into output (B, Q, M, D).
// backward: whole heads [begin, end) of B x M; a head is owned by one call, so sums never depend
// on the number of threads.
#define PMVIS_DECLARE(T)                                                                         \
  void copy_tokens(const Attention<T>& call, const uint8_t* padding, const T* from, T* to,       \
                   bool unpacks, int64_t begin, int64_t end);                                    \
  void forward(const Attention<T>& call, T* output, int64_t begin, int64_t end);                 \
  void backward(const Attention<T>& call, const Gradients<T>& gradients, int64_t begin,          \
                int64_t end);

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
