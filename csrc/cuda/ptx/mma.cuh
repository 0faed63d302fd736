// One tensor-core product of a warp: c[16][8] += a[16][16] * b[16][8], values of 16 bits, sums in float.
//
// With g = lane / 4, t = lane % 4, and two neighbours per word (the first in the low half):
//   a[0]: a[g][2t..]  a[1]: a[g + 8][2t..]  a[2]: a[g][2t + 8..]  a[3]: a[g + 8][2t + 8..]
//   b0: b[2t..][g]  b1: b[2t + 8..][g]      c[0..1]: c[g][2t..]   c[2..3]: c[g + 8][2t..]
#pragma once
#include "../types.cuh"
#if defined(KVCACHE_EMULATED)
#include "../../emulation/tensor_core.h"
#endif

namespace kvcache::cuda {

#if defined(KVCACHE_EMULATED)

template <class T>
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 KVCACHE_SITE) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>, "bf16 or f16");
  emulation::mma_m16n8k16(std::is_same_v<T, bf16>, c, a, b0, b1, site);
}

#else

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>, "bf16 or f16");
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

#endif

}  // namespace kvcache::cuda
