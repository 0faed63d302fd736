// The worst candidate of a head, found by a block: choose_victims and evict.
#pragma once
#include "score_keys.cuh"

namespace kvcache::cuda {

// Worse is smaller: the score's key above, the position's below; among equals the first slot.
struct Worst {
  uint64_t key;
  int slot;  // -1: no candidate

  __device__ __forceinline__ void offer(uint64_t other_key, int other_slot) {
    const bool better = other_slot >= 0 && (slot < 0 || other_key < key || (other_key == key && other_slot < slot));
    key = better ? other_key : key;
    slot = better ? other_slot : slot;
  }
  __device__ __forceinline__ void reduce_warp() {
#pragma unroll
    for (int distance = 16; distance > 0; distance >>= 1) {
      const uint32_t high = __shfl_xor_sync(kFullWarp, uint32_t(key >> 32), distance);
      const uint32_t low = __shfl_xor_sync(kFullWarp, uint32_t(key), distance);
      const int other = __shfl_xor_sync(kFullWarp, slot, distance);
      offer(uint64_t(high) << 32 | low, other);
    }
  }
  // Every thread of a block of kThreads gets the block's worst; of_warp [kThreads / 32] is shared memory.
  template <int kThreads>
  __device__ __forceinline__ void reduce_block(Worst* of_warp) {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    reduce_warp();
    if (lane == 0) of_warp[warp] = *this;
    __syncthreads();
    *this = lane < kThreads / 32 ? of_warp[lane] : Worst{0, -1};
    reduce_warp();
  }
};

// This thread's share of slots begin .. until - 1. positions and scores [capacity]; scores null: the oldest is the worst.
template <int kThreads>
__device__ __forceinline__ Worst worst_of_slots(const int32_t* positions, const float* scores, int64_t begin, int until,
                                                int first, int end) {
  constexpr int kBatch = 4;  // entries that a thread reads at once
  Worst worst{0, -1};
  for (int64_t start = begin + threadIdx.x; start < until; start += kThreads * kBatch) {
    int position[kBatch];
    float score[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t slot = start + j * kThreads;
      const bool alive = slot < until;
      position[j] = alive ? positions[slot] : 0;
      score[j] = alive && scores != nullptr ? scores[slot] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t slot = start + j * kThreads;
      if (slot >= until || !is_candidate(position[j], first, end)) continue;
      // With scores the highest position goes first among equals, without them the lowest of all.
      const uint64_t key = scores != nullptr ? uint64_t(score_key(score[j])) << 32 | position_key(position[j])
                                             : uint32_t(~position_key(position[j]));
      worst.offer(key, int(slot));
    }
  }
  return worst;
}

}  // namespace kvcache::cuda
