#include "ops/common/isa.h"

#include <cstdlib>
#include <cstring>

namespace pmvis {

#if defined(PMVIS_X86_ISA)
bool use_avx2() {
  static const bool chosen = [] {
    const char* wish = std::getenv("PMVIS_CPU_ISA");
    if (wish != nullptr && std::strcmp(wish, "base") == 0) return false;
    return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
  }();
  return chosen;
}
#endif

}  // namespace pmvis
