// Arithmetic in one instruction of the special function unit.
#pragma once
#include "../device.cuh"

namespace kvcache::cuda {

// 2^x to about 2 ulp, 0 for -inf and below -126: exp2f without the scaling that keeps tiny results exact.
__device__ __forceinline__ float fast_exp2(float x) {
#if defined(KVCACHE_EMULATED)
  return x < -126.0f ? 0.0f : exp2f(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// log2(x) to about 1e-7 absolute near 1; -inf for 0.
__device__ __forceinline__ float fast_log2(float x) {
#if defined(KVCACHE_EMULATED)
  return log2f(x);
#else
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// tanh(x) to about 5e-4 relative.
__device__ __forceinline__ float fast_tanh(float x) {
#if defined(KVCACHE_EMULATED)
  return tanhf(x);
#else
  float result;
  asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

}  // namespace kvcache::cuda
