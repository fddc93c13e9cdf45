// The kernels of the operators for CPUs with AVX2 and FMA; compiled with -mavx2 -mfma.
#define PMVIS_ISA avx2
#include "deformable_attention.inc"
#include "local_attention.inc"
#include "pairwise.inc"
