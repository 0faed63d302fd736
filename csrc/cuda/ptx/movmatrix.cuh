// Transposes an 8 x 8 tile of 16-bit values that lies in the registers of a warp.
//
// Lane l hands in the values [l / 4][l % 4 * 2 ..+1], the layout of an mma's result, and gets [l % 4 * 2 ..+1][l / 4],
// that of its second operand.
#pragma once
#include "../device.cuh"

namespace kvcache::cuda {

__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair KVCACHE_SITE) {
#if defined(KVCACHE_EMULATED)
  const unsigned lane = threadIdx.x % 32, shift = lane / 4 % 2 * 16;
  const uint32_t lo = __shfl_sync(kFullWarp, pair, lane % 4 * 8 + lane / 8, 32 KVCACHE_AT_SITE);
  const uint32_t hi = __shfl_sync(kFullWarp, pair, lane % 4 * 8 + 4 + lane / 8, 32 KVCACHE_AT_SITE);
  return (lo >> shift & 0xffff) | (hi >> shift & 0xffff) << 16;
#else
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
#endif
}

}  // namespace kvcache::cuda
