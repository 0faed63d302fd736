// choose_victims: the worst candidate of each head over its budget. One launch for any number of rows and heads, so that
// the heads of all layers can be rows of one call. Where heads are few and long (core/victim_plan.h) several blocks share
// one, each leaves the worst of its piece, and a second launch picks the worst of those: the same one whatever the order.
#include "../core/victim_plan.h"
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

// Block b looks at piece b % pieces of head b / pieces. With one piece per head its slot is the victim, otherwise the
// piece's worst goes to parts [rows * heads, pieces].
__global__ __launch_bounds__(kThreads) void worst_candidates(VictimParams p, VictimPlan plan, Worst* parts) {
  wait_for_dependencies();
  launch_dependents();
  KVCACHE_DYNAMIC_SHARED(Worst, of_warp);  // [kThreads / 32]
  const unsigned item = blockIdx.x / unsigned(plan.pieces), piece = blockIdx.x % unsigned(plan.pieces);
  const int64_t row = item / unsigned(p.heads), head = item % unsigned(p.heads);
  const int n = p.counts[row * p.counts_stride[0] + head * p.counts_stride[1]];
  const bool over = n > p.budgets[row * p.budgets_stride[0] + head * p.budgets_stride[1]];
  const int32_t* positions = p.positions + row * p.positions_stride[0] + head * p.positions_stride[1];  // [capacity]
  const float* scores = nullptr;                                                                        // [capacity]
  if (p.scores != nullptr) scores = p.scores + row * p.scores_stride[0] + head * p.scores_stride[1];
  const int first = p.first[row], end = p.end[row];
  Worst worst{0, -1};
  const int64_t piece_begin = piece * plan.piece;
  const int until = int(min(int64_t(n), piece_begin + plan.piece));
  for (int64_t begin = piece_begin + threadIdx.x; over && begin < until; begin += kThreads * kBatch) {
    int position[kBatch];
    float score[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t slot = begin + j * kThreads;
      const bool alive = slot < until;
      position[j] = alive ? positions[slot] : 0;
      score[j] = alive && scores != nullptr ? scores[slot] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t slot = begin + j * kThreads;
      if (slot >= until || !is_candidate(position[j], first, end)) continue;
      // With scores the highest position goes first among equals, without them the lowest of all.
      const uint64_t key = scores != nullptr ? uint64_t(score_key(score[j])) << 32 | position_key(position[j])
                                             : uint32_t(~position_key(position[j]));
      worst.offer(key, int(slot));
    }
  }
  worst.reduce_warp();
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  if (lane == 0) of_warp[warp] = worst;
  __syncthreads();
  if (warp != 0) return;
  worst = lane < kThreads / 32 ? of_warp[lane] : Worst{0, -1};
  worst.reduce_warp();
  if (lane != 0) return;
  if (parts == nullptr) {
    p.victims[item] = worst.slot;
  } else {
    parts[blockIdx.x] = worst;
  }
}

// One warp per head.
__global__ __launch_bounds__(kThreads) void worst_of_pieces(int32_t* victims, const Worst* parts, int items,
                                                            int pieces) {
  wait_for_dependencies();
  launch_dependents();
  const int64_t item = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (item >= items) return;
  Worst worst{0, -1};
  for (int piece = int(threadIdx.x) % 32; piece < pieces; piece += 32) {
    const Worst other = parts[item * pieces + piece];  // parts [items, pieces]
    worst.offer(other.key, other.slot);
  }
  worst.reduce_warp();
  if (threadIdx.x % 32 == 0) victims[item] = worst.slot;
}

}  // namespace

int64_t choose_victims_scratch(const VictimParams& p) {
  const int64_t pieces = victim_plan(p.rows, p.heads, p.capacity).pieces;
  return pieces == 1 ? 0 : int64_t(p.rows) * p.heads * pieces * int64_t(sizeof(Worst));
}

int choose_victims(const VictimParams& p, void* scratch, Stream stream) {
  const int64_t items = int64_t(p.rows) * p.heads;
  if (items == 0) return 0;
  const VictimPlan plan = victim_plan(p.rows, p.heads, p.capacity);
  if (items * plan.pieces > INT32_MAX) return 9;  // cudaErrorInvalidConfiguration
  Worst* parts = plan.pieces == 1 ? nullptr : static_cast<Worst*>(scratch);
  const int error = KVCACHE_LAUNCH_DEPENDENT(worst_candidates, dim3(unsigned(items * plan.pieces)), dim3(kThreads),
                                             kThreads / 32 * sizeof(Worst), stream, p, plan, parts);
  if (error != 0 || parts == nullptr) return error;
  return KVCACHE_LAUNCH_DEPENDENT(worst_of_pieces, dim3(unsigned((items + kThreads / 32 - 1) / (kThreads / 32))),
                                  dim3(kThreads), 0, stream, p.victims, parts, int(items), int(plan.pieces));
}

}  // namespace kvcache::cuda
