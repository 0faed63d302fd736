// The 16-bit floating point formats, as bits.
#pragma once
#include <cstdint>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace kvcache::emulation {

inline uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

inline float bfloat_to_float(uint16_t x) { return bits_float(uint32_t(x) << 16); }

inline uint16_t float_to_bfloat(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // the NaN that cvt.rn.bf16.f32 gives
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

#if defined(__F16C__)

inline float half_to_float(uint16_t x) { return _cvtsh_ss(x); }
inline uint16_t float_to_half(float x) {
  return x != x ? 0x7fff : uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

inline float half_to_float(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000u) << 16, exponent = x >> 10 & 0x1f, fraction = x & 0x3ffu;
  if (exponent == 0) return bits_float(sign | float_bits(float(fraction) * 0x1p-24f));
  if (exponent == 31) return bits_float(sign | 0x7f800000u | fraction << 13);
  return bits_float(sign | (exponent + 112) << 23 | fraction << 13);
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return 0x7fff;
  if (size >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 65536 or more
  if (size < 0x38800000u) {                                  // subnormal: let an addition round at the last bit
    return uint16_t(sign | (float_bits(bits_float(size) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | (((size + 0xfffu + (size >> 13 & 1)) >> 13) - (112u << 10)));
}

#endif

}  // namespace kvcache::emulation
