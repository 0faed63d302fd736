// Reading queries and writing results whose type is known at run time only, or that may lie anywhere: all attention kernels.
#pragma once
#include <cstdint>

#include "../core/paged_view.h"
#include "types.cuh"

namespace kvcache::cuda {

__device__ __forceinline__ float load_as_float(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  return dtype == DType::kBFloat16 ? to_float(static_cast<const bf16*>(data)[i])
                                   : to_float(static_cast<const f16*>(data)[i]);
}
__device__ __forceinline__ void store_as(void* data, DType dtype, int64_t i, float x) {
  if (dtype == DType::kFloat32) static_cast<float*>(data)[i] = x;
  else if (dtype == DType::kBFloat16) static_cast<bf16*>(data)[i] = from_float<bf16>(x);
  else static_cast<f16*>(data)[i] = from_float<f16>(x);
}

// Eight neighbouring values of 16 bits; aligned: to 16 bytes.
template <class T>
__device__ __forceinline__ uint4 load_eight(const T* from, bool aligned) {
  static_assert(sizeof(T) == 2, "values of 16 bits");
  if (aligned) return *reinterpret_cast<const uint4*>(from);
  uint32_t words[4];
  for (int j = 0; j < 4; ++j) words[j] = from[2 * j].bits | uint32_t(from[2 * j + 1].bits) << 16;
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace kvcache::cuda
