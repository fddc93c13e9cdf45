// The kernels of the operators for any CPU of the target architecture.
#define PMVIS_ISA base
#include "deformable_attention.inc"
#include "local_attention.inc"
#include "pairwise.inc"
