// Shares out the entries of all heads among the blocks of decode attention: one block for each layer, all layers in one
// launch. The arithmetic is in core/decode_plan.h.
//
// Each warp has a run of items. A first pass over the counts gives the number of units, from which the shares follow; the
// second finds, for 32 items at a time, the shares that begin or end in them: a lane for each such share.
#include "plan_decode.cuh"

#include "kernels.h"
#include "ptx/dependent_launch.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kMostWarps = 32;

__device__ __forceinline__ int units_of(const PlanInput& in, const int32_t* counts, int item, int unit) {
  const int counted = counts[in.counted_heads == in.heads ? item : item / in.heads];
  return plan_units(int64_t(max(min(counted, in.width), 0)) * in.factor + in.added, in.most, unit);
}

// The lane whose units hold `unit`; `before`: units before those of the lane's item, ascending.
__device__ __forceinline__ int lane_with(int before, int unit) {
  int found = 0;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const int other = __shfl_sync(kFullWarp, before, found + step);
    if (other <= unit) found += step;
  }
  return found;
}

__global__ void __launch_bounds__(kMostWarps * 32) plan_decode_kernel(PlanInput in) {
  __shared__ int sums[kMostWarps];
  wait_for_dependencies();
  launch_dependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int items = in.rows * in.heads, unit = plan_unit(items, in.most);
  const int32_t* counts = in.counts + int64_t(blockIdx.x) * in.rows * in.counted_heads;
  DecodePlan* plan = reinterpret_cast<DecodePlan*>(in.plan + blockIdx.x * decode_plan_size(in.workers));

  const int run = (items + warps - 1) / warps, first = min(warp * run, items), end = min(first + run, items);
  int sum = 0;
#pragma unroll 4
  for (int item = first + lane; item < end; item += 32) sum += units_of(in, counts, item, unit);
  sum = warp_sum(sum);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  int base = 0, total = 0;
  for (int i = 0; i < warps; ++i) {
    if (i < warp) base += sums[i];
    total += sums[i];
  }

  const int busy = plan_busy(total, in.workers, unit);
  if (threadIdx.x == 0) plan->head = {items, unit, busy, {}};
  for (int w = busy + int(threadIdx.x); w < in.workers; w += blockDim.x) empty_share(plan->shares[w]);

  for (int at = first; at < end; at += 32) {
    const int units = at + lane < end ? units_of(in, counts, at + lane, unit) : 0;
    int through = units;  // the last item
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(kFullWarp, through, distance);
      if (lane >= distance) through += other;
    }
    const int before = base + through - units, here = __shfl_sync(kFullWarp, through, 31);
    const int last = share_of(base + here - 1, total, busy);
    for (int w = share_of(base, total, busy) + lane; w - lane <= last; w += 32) {
      const int begins = int(share_begin(w, total, busy)), ends = int(share_begin(w + 1, total, busy)) - 1;
      int found = lane_with(before, begins);
      int from = __shfl_sync(kFullWarp, before, found), n = __shfl_sync(kFullWarp, units, found);
      if (w <= last && begins >= base) begin_share(plan->shares[w], w, total, busy, at + found, from, n);
      found = lane_with(before, ends);
      from = __shfl_sync(kFullWarp, before, found), n = __shfl_sync(kFullWarp, units, found);
      if (w <= last && ends < base + here) end_share(plan->shares[w], w, total, busy, at + found, from, n);
    }
    base += here;
  }
}

}  // namespace

int plan_items(const PlanInput& in, void* stream) {
  const int items = in.rows * in.heads;
  if (in.layers == 0 || in.workers == 0) return 0;
  const int warps = items < 1 ? 1 : items < kMostWarps ? items : kMostWarps;
  return KVCACHE_LAUNCH_DEPENDENT(plan_decode_kernel, in.layers, warps * 32, 0, stream, in);
}

int plan_decode(const PlanParams& p, Stream stream) {
  PlanInput in{};
  in.counts = p.counts;
  in.layers = p.layers, in.rows = p.rows;
  in.heads = in.counted_heads = p.heads;
  in.width = INT32_MAX, in.factor = 1;
  in.added = p.added, in.most = p.most;
  in.workers = p.workers, in.plan = p.plan;
  return plan_items(in, stream);
}

}  // namespace kvcache::cuda
