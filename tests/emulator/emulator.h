// A C++ compiler's GPU: enough of CUDA's words to run the kernels of csrc/ops on the CPU, a block
// after the other. Threads of a block are fibers, which change over where they wait for each other;
// a wait that not all threads reach is an error instead of a hang.
#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define PMVIS_DEVICE inline
#define PMVIS_DYNAMIC_SHARED(name) unsigned char* name = emulator::block().dynamic.data()

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 << 10;
enum class State { ready, in_warp, in_block, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::ready;
  dim3 index;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned char> dynamic;
  std::vector<double> slots;  // what the lanes of every warp show each other
  ucontext_t scheduler;
  unsigned running = 0;
  std::function<void()> kernel;
};

inline Block& block() {
  static Block one;
  return one;
}

// Hands over to the scheduler.
inline void wait(State state) {
  Block& all = block();
  Fiber& me = all.fibers[all.running];
  me.state = state;
  swapcontext(&me.context, &all.scheduler);
}

inline void enter() {
  block().kernel();
  wait(State::done);
}

// Sets the fibers [begin, end) free if all of them wait for each other.
inline bool release(unsigned begin, unsigned end, State state) {
  std::vector<Fiber>& fibers = block().fibers;
  for (unsigned n = begin; n < end; ++n) {
    if (fibers[n].state != state) return false;
  }
  for (unsigned n = begin; n < end; ++n) fibers[n].state = State::ready;
  return true;
}

inline void run_block(unsigned threads) {
  Block& all = block();
  for (unsigned n = 0; n < threads; ++n) {
    Fiber& fiber = all.fibers[n];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.state = State::ready;
    fiber.index = {n % blockDim.x, n / blockDim.x, 0};
  }
  for (unsigned done = 0; done < threads;) {
    for (unsigned n = 0; n < threads; ++n) {
      if (all.fibers[n].state != State::ready) continue;
      all.running = n;
      threadIdx = all.fibers[n].index;
      swapcontext(&all.scheduler, &all.fibers[n].context);
    }
    done = 0;
    for (unsigned n = 0; n < threads; ++n) done += all.fibers[n].state == State::done;
    bool moved = done == threads || release(0, threads, State::in_block);
    for (unsigned n = 0; n < threads; n += kWarp) moved |= release(n, n + kWarp, State::in_warp);
    if (!moved) throw std::runtime_error("emulator: not all threads reach a barrier");
  }
}

template <typename Kernel>
void launch(dim3 grid, dim3 threads, size_t shared, const Kernel& kernel) {
  const unsigned number = threads.x * threads.y;
  if (number % kWarp != 0 || threads.z != 1) throw std::runtime_error("emulator: odd block");
  Block& all = block();
  if (all.fibers.size() < number) all.fibers = std::vector<Fiber>(number);
  all.dynamic.assign(shared + 16, 0xa5);
  all.slots.assign(number, 0);
  all.kernel = kernel;
  gridDim = grid;
  blockDim = threads;
  // A GPU runs blocks in any order: this one forwards or, if so asked, backwards.
  const bool backwards = getenv("PMVIS_EMULATE_BACKWARDS") != nullptr;
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  for (size_t n = 0; n < blocks; ++n) {
    const size_t at = backwards ? blocks - 1 - n : n;
    blockIdx = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                static_cast<unsigned>(at / grid.x / grid.y)};
    run_block(number);
  }
}

// Calls a kernel with arguments as a driver gets them: a list of their addresses.
template <typename... Arguments, size_t... Places>
void call(void (*kernel)(Arguments...), void** arguments, std::index_sequence<Places...>) {
  kernel(*static_cast<Arguments*>(arguments[Places])...);
}

template <typename... Arguments>
void launch(void (*kernel)(Arguments...), const unsigned* grid, const unsigned* threads,
            size_t shared, void** arguments) {
  launch(dim3(grid[0], grid[1], grid[2]), dim3(threads[0], threads[1], threads[2]), shared,
         [=] { call(kernel, arguments, std::index_sequence_for<Arguments...>()); });
}

inline float half_to_float(unsigned short half) {
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  const float size = exponent == 31 ? (mantissa != 0 ? NAN : INFINITY)
                     : exponent == 0 ? ldexpf(static_cast<float>(mantissa), -24)
                                     : ldexpf(static_cast<float>(mantissa + 1024), exponent - 25);
  return (half & 0x8000) != 0 ? -size : size;
}

inline unsigned short float_to_half(float x) {
  const unsigned short sign = signbit(x) ? 0x8000 : 0;
  const float size = fabsf(x);
  if (isnan(x)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = 0;
  frexpf(size, &exponent);
  if (size == 0 || exponent < -13) exponent = -13;
  // Whole units of the last place; a carry walks into the exponent by itself.
  const int units = static_cast<int>(nearbyintf(ldexpf(size, 11 - exponent)));
  return static_cast<unsigned short>(sign | ((exponent + 13) * 1024 + units));
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::in_block); }
inline void __syncwarp() { emulator::wait(emulator::State::in_warp); }
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  emulator::Block& all = emulator::block();
  const unsigned me = all.running;
  static_assert(sizeof(T) <= sizeof(double));
  memcpy(&all.slots[me], &x, sizeof x);
  __syncwarp();
  memcpy(&x, &all.slots[me ^ static_cast<unsigned>(mask)], sizeof x);
  __syncwarp();
  return x;
}
template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
void atomicAdd(T* to, T x) {
  *to += x;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof x);
  return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
