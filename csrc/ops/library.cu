// What `_C_cuda.so` tells of itself.
#include "ops/common/stable_tensor.h"

#define PMVIS_PUBLIC extern "C" __attribute__((visibility("default")))

// The version of the schemas that the kernels were written for; 0: torch refused them.
PMVIS_PUBLIC int pmvis_cuda_schemas() { return pmvis::refused() ? 0 : pmvis::kSchemas; }
