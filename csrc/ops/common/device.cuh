// What the GPU kernels share. The same text is compiled by nvcc (`_C_cuda.so`), by NVRTC (through
// cupy, which is why no header is included) and, for tests, by a C++ compiler that plays the GPU
// (tests/emulator/emulator.h).
#pragma once

#if defined(PMVIS_EMULATE)
#include "emulator.h"
#else
#define PMVIS_DEVICE __device__ __forceinline__
#define PMVIS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace pmvis {

using Int64 = long long;
using Word = unsigned int;

constexpr Word kWholeWarp = 0xffffffffu;

// The half types as bits: their headers are not always at hand, and sums are in float anyway.
struct Half {
  unsigned short bits;
};
struct Bfloat {
  unsigned short bits;
};

// What sums of T are kept in, and what its coordinates and weights are given in.
template <typename T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <typename T>
using Sum = typename SumOf<T>::type;

#if defined(PMVIS_EMULATE)
PMVIS_DEVICE float widen(Half x) { return emulator::half_to_float(x.bits); }
PMVIS_DEVICE void narrow(float x, Half* to) { to->bits = emulator::float_to_half(x); }
#else
PMVIS_DEVICE float widen(Half x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
PMVIS_DEVICE void narrow(float x, Half* to) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
}
#endif
PMVIS_DEVICE float widen(Bfloat x) { return __uint_as_float(static_cast<Word>(x.bits) << 16); }
PMVIS_DEVICE void narrow(float x, Bfloat* to) {
  const Word bits = __float_as_uint(x);
  const Word even = bits + 0x7fffu + ((bits >> 16) & 1u);
  to->bits = static_cast<unsigned short>(x == x ? even >> 16 : 0x7fc0u);
}
PMVIS_DEVICE float widen(float x) { return x; }
PMVIS_DEVICE void narrow(float x, float* to) { *to = x; }
PMVIS_DEVICE double widen(double x) { return x; }
PMVIS_DEVICE void narrow(double x, double* to) { *to = x; }

// N neighbouring elements as one piece of memory.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T lane[N];
};
// The bytes of a pack are fetched at once.
template <typename T, int N>
PMVIS_DEVICE void load(const T* from, Sum<T> (&to)[N]) {
  Pack<T, N> pack;
  if constexpr (sizeof(pack) == 16) {
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
    memcpy(&pack, &words, 16);
  } else if constexpr (sizeof(pack) == 8) {
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(from));
    memcpy(&pack, &words, 8);
  } else {
    memcpy(&pack, from, sizeof pack);
  }
#pragma unroll
  for (int n = 0; n < N; ++n) to[n] = widen(pack.lane[n]);
}

template <typename T, int N>
PMVIS_DEVICE void store(T* to, const Sum<T> (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int n = 0; n < N; ++n) narrow(from[n], &pack.lane[n]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// Sums in memory that many threads add to, in any order; Hopper adds 16 bytes at once.
template <typename A, int N>
PMVIS_DEVICE void add_to(A* to, const A (&x)[N], double) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (N == 4 && sizeof(A) == 4) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                     __cvta_generic_to_global(to)),
                 "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
  } else
#endif
  {
#pragma unroll
    for (int n = 0; n < N; ++n) atomicAdd(to + n, x[n]);
  }
}

// The same in whole multiples of 1 / scale: whole numbers have one sum in every order.
template <typename A, int N>
PMVIS_DEVICE void add_to(Int64* to, const A (&x)[N], double scale) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const Int64 part = llrint(static_cast<double>(x[n]) * scale);
    atomicAdd(reinterpret_cast<unsigned long long*>(to + n), static_cast<unsigned long long>(part));
  }
}

template <typename A>
PMVIS_DEVICE A from_lane(A x, int mask) {
  return __shfl_xor_sync(kWholeWarp, x, mask);
}

PMVIS_DEVICE int least(int a, int b) { return a < b ? a : b; }
PMVIS_DEVICE int most(int a, int b) { return a > b ? a : b; }

}  // namespace pmvis
