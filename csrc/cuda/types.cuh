// The storage types and their conversions. Arithmetic is in float.
#pragma once
#include <cstdint>
#include <type_traits>

#include "ptx/convert.cuh"

namespace kvcache::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return bf16_bits_to_float(x.bits); }
__device__ __forceinline__ float to_float(f16 x) { return f16_bits_to_float(x.bits); }

// To the nearest, ties to even; NaN stays NaN and what is too large becomes infinite.
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return bf16{float_to_bf16_bits(x)};
  } else if constexpr (std::is_same_v<T, f16>) {
    return f16{float_to_f16_bits(x)};
  } else {
    static_assert(std::is_same_v<T, float>, "storage is float, bf16 or f16");
    return x;
  }
}

// Two neighbours in memory as one word: `lo` has the lower address.
template <class T>
__device__ __forceinline__ uint32_t pack2(float lo, float hi) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>, "two values of 16 bits");
  return std::is_same_v<T, bf16> ? floats_to_bf16x2(lo, hi) : floats_to_f16x2(lo, hi);
}

template <class T>
__device__ __forceinline__ void unpack2(uint32_t word, float& lo, float& hi) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>, "two values of 16 bits");
  if constexpr (std::is_same_v<T, bf16>) {
    lo = __uint_as_float(word << 16);
    hi = __uint_as_float(word & 0xffff0000u);
  } else {
    f16x2_to_floats(word, lo, hi);
  }
}

}  // namespace kvcache::cuda
