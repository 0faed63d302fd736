// Copies with a hint for the L2: data that pass through once should not push out what is read again.
#pragma once
#include "cp_async.cuh"

namespace kvcache::cuda {

#if defined(KVCACHE_EMULATED)

inline uint64_t l2_policy(bool) { return 0; }
inline void cp_async_16_hinted(void* shared, const void* global, bool full, uint64_t KVCACHE_SITE) {
  cp_async_16(shared, global, full KVCACHE_AT_SITE);
}

#else

// The hint that a lane gives with its copies: leave the L2 first, or stay as usual.
__device__ __forceinline__ uint64_t l2_policy(bool once) {
  uint64_t policy;
  if (once) asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  else asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void cp_async_16_hinted(void* shared, const void* global, bool full, uint64_t policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(shared_address(shared)),
      "l"(global), "r"(full ? 16 : 0), "l"(policy)
      : "memory");
}

#endif

}  // namespace kvcache::cuda
