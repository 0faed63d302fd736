// Bugs of order: barriers, warps, lanes, blocks.
#include "planted.h"

namespace kvcache::cuda::planted {
namespace {

template <bool kBug>
__global__ void no_barrier(float* out) {  // [64]
  KVCACHE_DYNAMIC_SHARED(float, s);       // [64]
  s[threadIdx.x] = float(threadIdx.x);
  if (!kBug) __syncthreads();
  out[threadIdx.x] = s[63 - threadIdx.x];
}

KVCACHE_PLANTED(no_barrier_between_write_and_read) {
  Buffer<float> out(64);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(no_barrier), 1, 64, 256, nullptr, out.data()), out,
                 [](size_t i) { return 63 - i; });
}

template <bool kBug>
__global__ void no_barrier_before_reuse(float* out) {  // [64]
  KVCACHE_DYNAMIC_SHARED(float, s);                    // [64]
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    s[threadIdx.x] = float(threadIdx.x + round);
    __syncthreads();
    sum += s[63 - threadIdx.x];
    if (!kBug) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

KVCACHE_PLANTED(no_barrier_before_shared_memory_is_reused) {
  Buffer<float> out(64);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(no_barrier_before_reuse), 1, 64, 256, nullptr, out.data()), out,
                 [](size_t i) { return 3 * (63 - i) + 3; });
}

template <bool kBug>
__global__ void no_syncwarp(float* out) {  // [32]
  KVCACHE_DYNAMIC_SHARED(float, s);        // [32]
  if (threadIdx.x == 0) {
    for (int i = 0; i < 32; ++i) s[i] = float(i);
  }
  if (!kBug) __syncwarp();
  // A shuffle orders nothing: it must not hide the missing __syncwarp.
  const float first = __shfl_sync(kFullWarp, float(threadIdx.x), 0);
  out[threadIdx.x] = s[31 - threadIdx.x] + first;
}

KVCACHE_PLANTED(no_syncwarp) {
  Buffer<float> out(32);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(no_syncwarp), 1, 32, 128, nullptr, out.data()), out,
                 [](size_t i) { return 31 - i; });
}

template <bool kBug>
__global__ void syncwarp_of_others(float* out) {  // [32]
  KVCACHE_DYNAMIC_SHARED(float, s);               // [32]
  const unsigned lane = threadIdx.x, mine = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  s[lane] = float(lane);
  __syncwarp(mine);  // each half of the warp for itself
  const unsigned source = kBug ? lane ^ 16 : lane ^ 8;
  out[lane] = s[source];
}

KVCACHE_PLANTED(syncwarp_of_a_mask_without_the_writer) {
  Buffer<float> out(32);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(syncwarp_of_others), 1, 32, 128, nullptr, out.data()), out,
                 [&](size_t i) { return bug ? i ^ 16 : i ^ 8; });
}

template <bool kBug>
__global__ void skips_barrier(float* out) {  // [64]
  out[threadIdx.x] = 1.0f;
  if (threadIdx.x < 32 || !kBug) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

KVCACHE_PLANTED(divergent_barrier) {
  Buffer<float> out(64);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(skips_barrier), 1, 64, 0, nullptr, out.data()), out,
                 [](size_t) { return 1; });
}

template <bool kBug>
__global__ void barrier_in_half_a_warp(float* out) {  // [32]
  if (threadIdx.x < 16 || !kBug) __syncthreads();
  out[threadIdx.x] = __shfl_sync(kFullWarp, 1.0f, 0);
}

KVCACHE_PLANTED(some_lanes_at_a_barrier_others_at_a_shuffle) {
  Buffer<float> out(32);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(barrier_in_half_a_warp), 1, 32, 0, nullptr, out.data()), out,
                 [](size_t) { return 1; });
}

template <bool kBug>
__global__ void exits_early(float* out) {  // [32]
  out[threadIdx.x] = 1.0f;
  if (kBug && threadIdx.x == 31) return;
  out[threadIdx.x] = warp_sum(1.0f);
}

KVCACHE_PLANTED(lane_exits_before_a_shuffle) {
  Buffer<float> out(32);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(exits_early), 1, 32, 0, nullptr, out.data()), out,
                 [](size_t) { return 32; });
}

template <bool kBug>
__global__ void two_lines(float* out) {  // [32]
  float sum;
  if (threadIdx.x < 16 || !kBug) {
    sum = warp_sum(1.0f);
  } else {
    sum = warp_sum(1.0f);  // in the same helper, but another call
  }
  out[threadIdx.x] = sum;
}

KVCACHE_PLANTED(lanes_shuffle_at_two_lines) {
  Buffer<float> out(32);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(two_lines), 1, 32, 0, nullptr, out.data()), out,
                 [](size_t) { return 32; });
}

template <bool kBug>
__global__ void outside_the_mask(float* out) {  // [32]
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_xor_sync(0xffffu, float(threadIdx.x), kBug ? 16 : 8);
  } else {
    out[threadIdx.x] = float(threadIdx.x);
  }
}

KVCACHE_PLANTED(shuffle_from_a_lane_outside_of_the_mask) {
  Buffer<float> out(32);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(outside_the_mask), 1, 32, 0, nullptr, out.data()), out,
                 [](size_t i) { return i < 16 ? i ^ 8 : i; });
}

template <bool kBug>
__global__ void two_masks(int* out) {  // [32]
  out[threadIdx.x] = __any_sync(kBug && threadIdx.x < 16 ? 0x1ffffu : kFullWarp, 1);
}

KVCACHE_PLANTED(lanes_meet_under_different_masks) {
  Buffer<int> out(32);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(two_masks), 1, 32, 0, nullptr, out.data()), out, [](size_t) { return 1; });
}

template <bool kBug>
__global__ void count_in_shared(int* out) {  // [64]
  KVCACHE_DYNAMIC_SHARED(int, s);            // [1]
  if (threadIdx.x == 0) *s = 0;
  __syncthreads();
  atomicAdd(s, 1);
  if (!kBug) __syncthreads();
  out[threadIdx.x] = *s;
}

KVCACHE_PLANTED(plain_read_of_an_atomic_counter) {
  Buffer<int> out(64);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(count_in_shared), 1, 64, 4, nullptr, out.data()), out,
                 [](size_t) { return 64; });
}

template <bool kBug>
__global__ void blocks_write_the_same(int* out) {  // [96]
  out[blockIdx.x * (kBug ? 31 : 32) + threadIdx.x] = 1;
}

KVCACHE_PLANTED(two_blocks_write_the_same_place) {
  Buffer<int> out(bug ? 94 : 96);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(blocks_write_the_same), 3, 32, 0, nullptr, out.data()), out,
                 [](size_t) { return 1; });
}

template <bool kBug>
__global__ void last_block_adds_up(int* out, int* parts, int* counter) {  // [1], [4], [1]
  KVCACHE_DYNAMIC_SHARED(int, last);                                      // [1]
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = int(blockIdx.x) + 1;
    if (!kBug) __threadfence();
    *last = atomicAdd(counter, 1) == int(gridDim.x) - 1;
  }
  __syncthreads();
  if (*last && threadIdx.x == 0) *out = parts[0] + parts[1] + parts[2] + parts[3];
}

KVCACHE_PLANTED(last_block_reads_without_a_fence) {
  Buffer<int> out(1), parts(4), counter(1);
  return verdict(
      KVCACHE_LAUNCH(KVCACHE_PICK(last_block_adds_up), 4, 32, 4, nullptr, out.data(), parts.data(), counter.data()),
      out, [](size_t) { return 10; });
}

template <bool kBug>
__global__ void through_global(int* out, int* scratch) {  // [64], [64]
  scratch[threadIdx.x] = int(threadIdx.x);
  if (!kBug) __syncthreads();
  out[threadIdx.x] = scratch[threadIdx.x / 2];
}

KVCACHE_PLANTED(no_barrier_between_threads_of_a_block_in_global_memory) {
  Buffer<int> out(64), scratch(64);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(through_global), 1, 64, 0, nullptr, out.data(), scratch.data()), out,
                 [](size_t i) { return i / 2; });
}

}  // namespace
}  // namespace kvcache::cuda::planted
