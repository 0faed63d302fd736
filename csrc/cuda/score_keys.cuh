// Scores and positions as unsigned numbers in the order of topk and choose_victims; cpu/topk.inl has the same.
#pragma once
#include <cstdint>

#include "device.cuh"

namespace kvcache::cuda {

// Larger is better; NaN ranks with -inf, -0 with 0. Neither 0 nor 0xffffffff occurs.
__device__ __forceinline__ uint32_t score_key(float score) {
  uint32_t bits = __float_as_uint(score);
  bits = (bits & 0x7fffffffu) > 0x7f800000u ? 0xff800000u : bits;
  bits = bits == 0x80000000u ? 0u : bits;
  return bits ^ (bits & 0x80000000u ? 0xffffffffu : 0x80000000u);
}

// A low position is better.
__device__ __forceinline__ uint32_t position_key(int position) { return ~(uint32_t(position) ^ 0x80000000u); }

__device__ __forceinline__ bool is_candidate(int position, int first, int end) {
  return position >= first && position < end;
}

}  // namespace kvcache::cuda
