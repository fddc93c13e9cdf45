// The kernels of the operators for CPUs with AVX2 and FMA; compiled with -mavx2 -mfma.
#define PMVIS_ISA avx2
#include "ops/clip_pairwise/kernels.inc"
#include "ops/deformable_attention/kernels.inc"
#include "ops/local_attention/kernels.inc"
#include "ops/pairwise/kernels.inc"
