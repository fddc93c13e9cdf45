// Loops of the mask operations that are built twice, plainly and for AVX2; both give the same
// results. Not for callers of dense.h.
#pragma once

#include <cstdint>

#define PMVIS_MASK_LOOPS                                                                        \
  /* Writes each k in [first, last) where mask[k] and mask[k - stride] differ in being zero;   */ \
  /* both are in the mask. Room: last - first + 32. Returns where the list ends.              */ \
  uint32_t* changes(const uint8_t* mask, int64_t stride, int64_t first, int64_t last,           \
                    uint32_t* out);

namespace pmvis {
namespace scalar {
PMVIS_MASK_LOOPS
}
#if defined(PMVIS_X86_ISA)
namespace avx2 {
PMVIS_MASK_LOOPS
}
#endif
}  // namespace pmvis

#undef PMVIS_MASK_LOOPS
