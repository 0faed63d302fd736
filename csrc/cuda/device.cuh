// What a kernel may use beyond plain CUDA C++, the same for nvcc and for csrc/emulation: launches, dynamic shared memory,
// reductions over a warp. Numbers are in types.cuh, single instructions in ptx/.
#pragma once
#include <cstdint>
#include <type_traits>

#if defined(KVCACHE_EMULATED)
#include "../emulation/cuda_on_host.h"
#else
#include <cuda_runtime.h>

#include "launch.cuh"

// The start of the block's dynamic shared memory as a T*; several names may stand for the same memory.
#define KVCACHE_DYNAMIC_SHARED(T, name)                                 \
  extern __shared__ __align__(128) unsigned char kvcache_shared_all_[]; \
  T* name = reinterpret_cast<T*>(kvcache_shared_all_)
// KVCACHE_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...) returns a CUDA error code, 0 when fine.
// grid and block: a dim3 or any integer. A template with commas goes into parentheses: (kernel<64, 2>).
#define KVCACHE_LAUNCH(kernel, ...) ::kvcache::cuda::launch(false, kernel, __VA_ARGS__)
// A parameter that names the caller's line in the emulator's messages; nothing on a GPU.
#define KVCACHE_SITE
#define KVCACHE_AT_SITE
#endif

namespace kvcache::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// Every lane gets the result; the order of the additions is fixed, hence the result is too.
template <class T>
__device__ __forceinline__ T warp_sum(T value KVCACHE_SITE) {
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1) {
    value += __shfl_xor_sync(kFullWarp, value, distance, 32 KVCACHE_AT_SITE);
  }
  return value;
}

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }  // the number where the other is NaN
template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return a < b ? b : a;
}

template <class T>
__device__ __forceinline__ T warp_max(T value KVCACHE_SITE) {
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1) {
    value = larger(value, __shfl_xor_sync(kFullWarp, value, distance, 32 KVCACHE_AT_SITE));
  }
  return value;
}

}  // namespace kvcache::cuda
