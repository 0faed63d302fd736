// Lets a plain C++17 compiler compile the kernels of csrc/cuda, for tests. docs/emulation.md says what is caught.
#pragma once
#include <stddef.h>

#if defined(__SANITIZE_THREAD__)
// Kernels of the race build call these, also where the compiler makes a copy a call.
extern "C" {
void* memcpy(void*, const void*, size_t) noexcept asm("kvcache_memcpy");
void* memmove(void*, const void*, size_t) noexcept asm("kvcache_memmove");
void* memset(void*, int, size_t) noexcept asm("kvcache_memset");
}
#endif

#include <math.h>

#include <cstdint>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
// All thread-local storage of the library is shared memory: one place to poison, and known to the race checker.
#define __shared__ static thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

namespace kvcache::emulation {
// Functions, as the race build must not take these reads for the kernel's.
KVCACHE_UNSEEN inline uint3 thread_index() { return self->thread; }
KVCACHE_UNSEEN inline uint3 block_index() { return block.index; }
KVCACHE_UNSEEN inline dim3 block_size() { return block.size; }
KVCACHE_UNSEEN inline dim3 grid_size() { return block.grid; }
KVCACHE_UNSEEN inline void* dynamic_shared() { return block.shared; }
}  // namespace kvcache::emulation

#define threadIdx (::kvcache::emulation::thread_index())
#define blockIdx (::kvcache::emulation::block_index())
#define blockDim (::kvcache::emulation::block_size())
#define gridDim (::kvcache::emulation::grid_size())
constexpr int warpSize = 32;

#define KVCACHE_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::kvcache::emulation::dynamic_shared())
#define KVCACHE_LAUNCH(kernel, ...) ::kvcache::emulation::launch(kernel, __VA_ARGS__)

using cudaStream_t = void*;

#include "atomics.h"
#include "collectives.h"
#include "intrinsics.h"
