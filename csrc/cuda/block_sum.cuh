// Sum over a block of kThreads threads, the same in all of them and for all orders of execution.
#pragma once
#include "device.cuh"

namespace kvcache::cuda {

// `shared` [kThreads / 32] is free afterwards.
template <int kThreads>
__device__ __forceinline__ float block_sum(float value, float* shared) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) sum += shared[i];
  __syncthreads();
  return sum;
}

}  // namespace kvcache::cuda
