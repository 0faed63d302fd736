// Asynchronous copies from global to shared memory. Each thread commits and waits for its own copies; what others copied
// is there after a barrier behind their wait. Addresses are aligned to the size of the copy.
#pragma once
#include "../device.cuh"

namespace kvcache::cuda {

#if defined(KVCACHE_EMULATED)

inline void cp_async_16(void* shared, const void* global, bool full = true KVCACHE_SITE) {
  emulation::copy_issue(shared, global, 16, full, site);
}
inline void cp_async_8(void* shared, const void* global, bool full = true KVCACHE_SITE) {
  emulation::copy_issue(shared, global, 8, full, site);
}
inline void cp_async_4(void* shared, const void* global, bool full = true KVCACHE_SITE) {
  emulation::copy_issue(shared, global, 4, full, site);
}
inline void cp_async_commit() { emulation::copy_commit(); }
template <int N>
inline void cp_async_wait() {
  emulation::copy_wait(N);
}

#else

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Writes zeros where !full; `global` is not read then. Bypasses L1, which these data would only pollute.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool full = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(full ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_8(void* shared, const void* global, bool full = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(full ? 8 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, bool full = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(full ? 4 : 0)
               : "memory");
}
// Closes a group: all copies issued since the last commit, perhaps none.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most the N newest groups are still under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif

}  // namespace kvcache::cuda
