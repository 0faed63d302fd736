// Tiles of 8 x 8 16-bit values from shared memory into the registers of a warp, in the layout that mma wants.
//
// Lane l names row l % 8 (16 bytes, aligned) of tile l / 8; x2 looks at lanes 0 .. 15 only. Lane l gets the values
// [l / 4][l % 4 * 2 ..+1] of tile i in r[i]; transposed: [l % 4 * 2 ..+1][l / 4].
#pragma once
#include "cp_async.cuh"
#if defined(KVCACHE_EMULATED)
#include "../../emulation/tensor_core.h"
#endif

namespace kvcache::cuda {

#if defined(KVCACHE_EMULATED)

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row KVCACHE_SITE) {
  emulation::ldmatrix<4, false>(r, row, "ldmatrix_x4", site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row KVCACHE_SITE) {
  emulation::ldmatrix<4, true>(r, row, "ldmatrix_x4_trans", site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row KVCACHE_SITE) {
  emulation::ldmatrix<2, false>(r, row, "ldmatrix_x2", site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row KVCACHE_SITE) {
  emulation::ldmatrix<2, true>(r, row, "ldmatrix_x2_trans", site);
}

#else

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

#endif

}  // namespace kvcache::cuda
