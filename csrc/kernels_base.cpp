// Deformable attention for any CPU of the target architecture.
#define PMVIS_ISA base
#include "deformable_attention.inc"
