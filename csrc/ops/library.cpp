// What `_C.so` tells of itself: the build of its kernels that this processor gets, and their version.
#include "ops/common/isa.h"
#include "ops/common/stable_tensor.h"

#define PMVIS_PUBLIC extern "C" __attribute__((visibility("default")))

PMVIS_PUBLIC const char* pmvis_isa() {
#if defined(PMVIS_X86_ISA)
  if (pmvis::use_avx2()) return "avx2";
#endif
  return "base";
}

// The version of the schemas that the kernels were written for; 0: torch refused them.
PMVIS_PUBLIC int pmvis_schemas() { return pmvis::refused() ? 0 : pmvis::kSchemas; }
