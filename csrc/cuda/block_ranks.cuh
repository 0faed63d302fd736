// Stable numbering of the chosen elements of a long list by one block: prefix counts by ballots.
#pragma once
#include "device.cuh"

namespace kvcache::cuda {

// A segment is kWarps * 32 * kPerLane neighbours; a warp has 32 * kPerLane of them, and lane l of it those at
// j * 32 + l, so that loads and stores of a warp are contiguous.
template <int kWarps, int kPerLane>
struct BlockRanks {
  static constexpr int kSegment = kWarps * 32 * kPerLane;

  // Offset in the segment of this thread's element j.
  __device__ static __forceinline__ int element(int warp, int j) {
    return (warp * kPerLane + j) * 32 + int(threadIdx.x) % 32;
  }

  // rank[j]: chosen elements of the segment before this thread's element j. Returns how many are chosen in all. All
  // kWarps warps take part (the whole block if more than one); totals [kWarps] is shared memory.
  __device__ static __forceinline__ int rank(int warp, const bool (&chosen)[kPerLane], int (&rank)[kPerLane],
                                             int* totals) {
    const int lane = int(threadIdx.x) % 32;
    int mine = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const unsigned set = __ballot_sync(kFullWarp, chosen[j]);
      rank[j] = mine + __popc(set & ((1u << lane) - 1));
      mine += __popc(set);
    }
    int before = 0, all = mine;
    if constexpr (kWarps > 1) {
      __syncthreads();  // the totals of the segment before have been read
      if (lane == 0) totals[warp] = mine;
      __syncthreads();
      all = 0;
      for (int w = 0; w < kWarps; ++w) {
        const int total = totals[w];
        before += w < warp ? total : 0;
        all += total;
      }
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) rank[j] += before;
    return all;
  }
};

}  // namespace kvcache::cuda
