// choose_victims: the worst candidate of each head over its budget. One block per head, one launch for any number of
// rows and heads, so that the heads of all layers can be rows of one call.
#include "kernels.h"
#include "ptx/dependent_launch.cuh"
#include "score_keys.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kThreads = 256, kBatch = 4;

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
};

__global__ __launch_bounds__(kThreads) void worst_candidates(VictimParams p) {
  wait_for_dependencies();
  launch_dependents();
  KVCACHE_DYNAMIC_SHARED(Worst, of_warp);  // [kThreads / 32]
  const int64_t row = blockIdx.x / unsigned(p.heads), head = blockIdx.x % unsigned(p.heads);
  const int n = p.counts[row * p.counts_stride[0] + head * p.counts_stride[1]];
  const bool over = n > p.budgets[row * p.budgets_stride[0] + head * p.budgets_stride[1]];
  const int32_t* positions = p.positions + row * p.positions_stride[0] + head * p.positions_stride[1];  // [capacity]
  const float* scores = nullptr;                                                                        // [capacity]
  if (p.scores != nullptr) scores = p.scores + row * p.scores_stride[0] + head * p.scores_stride[1];
  const int first = p.first[row], end = p.end[row];
  Worst worst{0, -1};
  for (int begin = int(threadIdx.x); over && begin < n; begin += kThreads * kBatch) {
    int position[kBatch];
    float score[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int slot = begin + j * kThreads;
      const bool alive = slot < n;
      position[j] = alive ? positions[slot] : 0;
      score[j] = alive && scores != nullptr ? scores[slot] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int slot = begin + j * kThreads;
      if (slot >= n || !is_candidate(position[j], first, end)) continue;
      // With scores the highest position goes first among equals, without them the lowest of all.
      const uint64_t key = scores != nullptr ? uint64_t(score_key(score[j])) << 32 | position_key(position[j])
                                             : uint32_t(~position_key(position[j]));
      worst.offer(key, slot);
    }
  }
  worst.reduce_warp();
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  if (lane == 0) of_warp[warp] = worst;
  __syncthreads();
  if (warp != 0) return;
  worst = lane < kThreads / 32 ? of_warp[lane] : Worst{0, -1};
  worst.reduce_warp();
  if (lane == 0) p.victims[blockIdx.x] = worst.slot;
}

}  // namespace

int choose_victims(const VictimParams& p, Stream stream) {
  const int64_t items = int64_t(p.rows) * p.heads;
  if (items == 0) return 0;
  if (items > INT32_MAX) return 9;  // cudaErrorInvalidConfiguration
  return KVCACHE_LAUNCH_DEPENDENT(worst_candidates, dim3(unsigned(items)), dim3(kThreads),
                                  kThreads / 32 * sizeof(Worst), stream, p);
}

}  // namespace kvcache::cuda
