// Programmatic dependent launch (sm_90): a kernel may start while the one before it on the stream is still finishing.
//
// The earlier kernel calls launch_dependents() when the rest of it leaves room; the later one, launched with
// KVCACHE_LAUNCH_DEPENDENT, calls wait_for_dependencies() before it touches anything that the earlier one writes (or
// still reads): that returns when the earlier kernel has ended and its writes are visible. Without the wait the launch
// must be an ordinary one. Elsewhere, and under emulation, all of this does nothing: launches follow one another.
#pragma once
#include "../device.cuh"

#if defined(KVCACHE_EMULATED)
#define KVCACHE_LAUNCH_DEPENDENT(kernel, ...) KVCACHE_LAUNCH(kernel, __VA_ARGS__)
#else
#define KVCACHE_LAUNCH_DEPENDENT(kernel, ...) ::kvcache::cuda::launch(true, kernel, __VA_ARGS__)
#endif

namespace kvcache::cuda {

__device__ __forceinline__ void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_dependencies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace kvcache::cuda
