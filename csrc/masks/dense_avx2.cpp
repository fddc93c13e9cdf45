// The loops of dense_isa.h for processors with AVX2; compiled with -mavx2 and the bit instructions.
#include <immintrin.h>

#include "masks/dense_isa.h"

namespace pmvis {
namespace avx2 {
namespace {

constexpr int64_t kBlock = 128;   // pixels looked at together
constexpr int64_t kAhead = 1024;  // how far ahead memory is asked for: a quarter of the time less

inline __m256i load(const uint8_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}

// Whether a block equals what lies `stride` before it. For neighbours, whether it is all like the
// pixel before, which is the same and takes no second look at the memory.
template <bool kNeighbours>
inline bool unchanged(const uint8_t* block, int64_t stride) {
  const __m256i last = _mm256_set1_epi8(static_cast<char>(block[-stride]));
  __m256i any = _mm256_setzero_si256();
  for (int64_t k = 0; k < kBlock; k += 32) {
    const __m256i before = kNeighbours ? last : load(block + k - stride);
    any = _mm256_or_si256(any, _mm256_xor_si256(load(block + k), before));
  }
  return _mm256_testz_si256(any, any) != 0;
}

// Bit k: whether pixel k, and not the one `stride` before it, is zero; or the other way round.
inline uint64_t unlike(const uint8_t* pixels, int64_t stride) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256i here = _mm256_cmpeq_epi8(load(pixels), zero);
  const __m256i before = _mm256_cmpeq_epi8(load(pixels - stride), zero);
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_xor_si256(here, before)));
}

template <bool kNeighbours>
uint32_t* list(const uint8_t* mask, int64_t stride, int64_t first, int64_t last, uint32_t* out) {
  int64_t at = first;
  for (; at + kBlock <= last; at += kBlock) {
    _mm_prefetch(reinterpret_cast<const char*>(mask + at + kAhead), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(mask + at + kAhead + 64), _MM_HINT_T0);
    if (unchanged<kNeighbours>(mask + at, stride)) continue;
    for (int64_t k = at; k < at + kBlock; k += 64) {
      uint64_t bits = unlike(mask + k, stride) | unlike(mask + k + 32, stride) << 32;
      for (; bits != 0; bits = _blsr_u64(bits)) {
        *out++ = static_cast<uint32_t>(k + static_cast<int64_t>(_tzcnt_u64(bits)));
      }
    }
  }
  return scalar::changes(mask, stride, at, last, out);
}

}  // namespace

uint32_t* changes(const uint8_t* mask, int64_t stride, int64_t first, int64_t last,
                  uint32_t* out) {
  return stride == 1 ? list<true>(mask, stride, first, last, out)
                     : list<false>(mask, stride, first, last, out);
}

}  // namespace avx2
}  // namespace pmvis
