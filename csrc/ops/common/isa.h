// The choice between the builds of a kernel: `base` for any processor, `avx2` where it can run.
#pragma once

// Before a function of a header that both builds include: never one of its own, because the linker
// would keep one copy, perhaps the AVX2 one, for everyone.
#define PMVIS_ALWAYS inline __attribute__((always_inline))

namespace pmvis {

#if defined(PMVIS_X86_ISA)
// Decided once; PMVIS_CPU_ISA=base in the environment refuses AVX2.
bool use_avx2();
// Calls FUNCTION(...), declared in both namespaces.
#define PMVIS_BEST_ISA(...) \
  do {                      \
    if (use_avx2()) {       \
      avx2::__VA_ARGS__;    \
    } else {                \
      base::__VA_ARGS__;    \
    }                       \
  } while (false)
#else
#define PMVIS_BEST_ISA(...) base::__VA_ARGS__
#endif

}  // namespace pmvis
