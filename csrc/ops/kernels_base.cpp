// The kernels of the operators for any CPU of the target architecture.
#define PMVIS_ISA base
#include "ops/clip_pairwise/kernels.inc"
#include "ops/deformable_attention/kernels.inc"
#include "ops/local_attention/kernels.inc"
#include "ops/pairwise/kernels.inc"
