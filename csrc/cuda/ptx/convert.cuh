// Conversions between float and the 16-bit formats, as bits. types.cuh gives them types.
#pragma once
#include "../device.cuh"
#if defined(KVCACHE_EMULATED)
#include "../../emulation/half.h"
#endif

namespace kvcache::cuda {

__device__ __forceinline__ float bf16_bits_to_float(uint16_t x) {
  return __uint_as_float(static_cast<uint32_t>(x) << 16);
}

#if defined(KVCACHE_EMULATED)

inline float f16_bits_to_float(uint16_t x) { return emulation::half_to_float(x); }
inline uint16_t float_to_bf16_bits(float x) { return emulation::float_to_bfloat(x); }
inline uint16_t float_to_f16_bits(float x) { return emulation::float_to_half(x); }
inline uint32_t floats_to_bf16x2(float lo, float hi) {
  return float_to_bf16_bits(lo) | static_cast<uint32_t>(float_to_bf16_bits(hi)) << 16;
}
inline uint32_t floats_to_f16x2(float lo, float hi) {
  return float_to_f16_bits(lo) | static_cast<uint32_t>(float_to_f16_bits(hi)) << 16;
}
inline void f16x2_to_floats(uint32_t x, float& lo, float& hi) {
  lo = f16_bits_to_float(static_cast<uint16_t>(x));
  hi = f16_bits_to_float(static_cast<uint16_t>(x >> 16));
}

#else

__device__ __forceinline__ float f16_bits_to_float(uint16_t x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x));
  return result;
}
__device__ __forceinline__ uint16_t float_to_bf16_bits(float x) {
  uint16_t result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ uint16_t float_to_f16_bits(float x) {
  uint16_t result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ uint32_t floats_to_bf16x2(float lo, float hi) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(hi), "f"(lo));
  return result;
}
__device__ __forceinline__ uint32_t floats_to_f16x2(float lo, float hi) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(hi), "f"(lo));
  return result;
}
__device__ __forceinline__ void f16x2_to_floats(uint32_t x, float& lo, float& hi) {
  asm("{ .reg .f16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h; }"
      : "=f"(lo), "=f"(hi)
      : "r"(x));
}

#endif

}  // namespace kvcache::cuda
