// choose_victims: the worst candidate of each head over its budget. One launch for any number of rows and heads, so that
// the heads of all layers can be rows of one call. Where heads are few and long (core/victim_plan.h) several blocks share
// one, each leaves the worst of its piece, and a second launch picks the worst of those: the same one whatever the order.
#include "../core/victim_plan.h"
#include "kernels.h"
#include "ptx/dependent_launch.cuh"
#include "worst_candidate.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kThreads = 256;

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
  const int64_t begin = piece * plan.piece;
  const int until = over ? int(min(int64_t(n), begin + plan.piece)) : 0;
  Worst worst = worst_of_slots<kThreads>(positions, scores, begin, until, first, end);
  worst.reduce_block<kThreads>(of_warp);
  if (threadIdx.x != 0) return;
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
