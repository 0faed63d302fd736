// Loads that leave the caches alone.
#pragma once
#include "../device.cuh"

namespace kvcache::cuda {

// For data that is read once and not written by this kernel: not kept in L1. V has 4, 8 or 16 bytes and the address is aligned to them.
template <class V>
__device__ __forceinline__ V load_streaming(const V* address KVCACHE_SITE) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "one load");
#if defined(KVCACHE_EMULATED)
  emulation::check_aligned(address, sizeof(V), "load_streaming", site);
  return *address;
#else
  union {
    uint32_t words[sizeof(V) / 4];
    V value;
  } result;
  uint32_t (&w)[sizeof(V) / 4] = result.words;
  if constexpr (sizeof(V) == 16) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(address));
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(address));
  } else {
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(w[0]) : "l"(address));
  }
  return result.value;
#endif
}

}  // namespace kvcache::cuda
