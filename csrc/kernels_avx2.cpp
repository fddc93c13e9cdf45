// Deformable attention for CPUs with AVX2 and FMA; compiled with -mavx2 -mfma.
#define PMVIS_ISA avx2
#include "deformable_attention.inc"
