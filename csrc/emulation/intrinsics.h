// Arithmetic that CUDA spells with its own names. Results are exact where CUDA's are approximate.
#pragma once
#include <math.h>

#include <cstdint>
#include <type_traits>

#include "scheduler.h"

namespace kvcache::emulation {
template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace kvcache::emulation

inline unsigned __float_as_uint(float x) { return kvcache::emulation::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return kvcache::emulation::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return kvcache::emulation::bits_as<float>(x); }
inline float __int_as_float(int x) { return kvcache::emulation::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return kvcache::emulation::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return kvcache::emulation::bits_as<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
  x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
  x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
  return __builtin_bswap32(x);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i) & 0xf, byte = unsigned(both >> (8 * (pick & 7))) & 0xff;
    result |= (pick & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);  // bit 3 spreads the sign
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift) {
  return unsigned((uint64_t(hi) << 32 | lo) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
  return unsigned((uint64_t(hi) << 32 | lo) >> (shift & 31));
}
inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }

inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }  // NaN becomes 0
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline int __float2int_rd(float x) { return int(floorf(x)); }
inline int __float2int_ru(float x) { return int(ceilf(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }

template <class T>
inline T __ldg(const T* address) {
  return *address;
}
template <class T>
inline T __ldcg(const T* address) {
  return *address;
}
template <class T>
inline T __ldcs(const T* address) {
  return *address;
}
template <class T>
inline void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
inline void __stcg(T* address, T value) {
  *address = value;
}

// CUDA's global min and max: of mixed types the usual arithmetic one; of floats the number where one is NaN.
template <class A, class B, class T = std::common_type_t<A, B>, class = std::enable_if_t<std::is_arithmetic_v<T>>>
inline T min(A a, B b) {
  if constexpr (std::is_floating_point_v<T>) {
    return T(a) < T(b) || T(b) != T(b) ? T(a) : T(b);
  } else {
    return T(b) < T(a) ? T(b) : T(a);
  }
}
template <class A, class B, class T = std::common_type_t<A, B>, class = std::enable_if_t<std::is_arithmetic_v<T>>>
inline T max(A a, B b) {
  if constexpr (std::is_floating_point_v<T>) {
    return T(a) > T(b) || T(b) != T(b) ? T(a) : T(b);
  } else {
    return T(a) < T(b) ? T(b) : T(a);
  }
}

[[noreturn]] inline void __trap(KVCACHE_ONLY_SITE) {
  kvcache::emulation::fail("__trap at " + kvcache::emulation::text(site));
}
inline void __nanosleep(unsigned) {}
