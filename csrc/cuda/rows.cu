// active_rows, gather_rows, scatter_rows: the tokens that a layer really computes, and their way back.
#include <algorithm>

#include "block_ranks.cuh"
#include "kernels.h"
#include "memory.cuh"
#include "ptx/dependent_launch.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kNumberWarps = 16, kNumberPerLane = 16;

__global__ __launch_bounds__(kNumberWarps * 32) void number_rows(ActiveRowsParams p) {
  wait_for_dependencies();
  launch_dependents();
  KVCACHE_DYNAMIC_SHARED(int, totals);  // [kNumberWarps]
  using Ranks = BlockRanks<kNumberWarps, kNumberPerLane>;
  const int warp = int(threadIdx.x) / 32;
  int found = 0;
  for (int64_t segment = 0; segment < p.n; segment += Ranks::kSegment) {
    bool active[kNumberPerLane];
    int rank[kNumberPerLane];
#pragma unroll
    for (int j = 0; j < kNumberPerLane; ++j) {
      const int64_t i = segment + Ranks::element(warp, j);
      active[j] = i < p.n && p.mask[i];
    }
    const int all = Ranks::rank(warp, active, rank, totals);
#pragma unroll
    for (int j = 0; j < kNumberPerLane; ++j) {
      if (active[j]) p.index[found + rank[j]] = int32_t(segment + Ranks::element(warp, j));
    }
    found += all;
  }
  for (int64_t i = found + int64_t(threadIdx.x); i < p.n; i += kNumberWarps * 32) p.index[i] = -1;
  if (threadIdx.x == 0) *p.count = found;
}

// kGather: picked row i is row index[i] of x, or zeros; else the other way round. `lanes` threads per row.
template <class Unit, bool kGather>
__global__ __launch_bounds__(kThreads) void move_rows(RowsParams p, int lanes, int64_t row_units) {
  wait_for_dependencies();
  launch_dependents();
  const int64_t i = int64_t(blockIdx.x) * (kThreads / lanes) + int(threadIdx.x) / lanes;
  if (i >= p.count) return;
  const int row = p.index[i];
  const bool listed = row >= 0 && row < p.n;
  Unit* x = static_cast<Unit*>(p.x) + (listed ? row * row_units : 0);
  Unit* picked = static_cast<Unit*>(p.picked) + i * row_units;
#pragma unroll 4
  for (int64_t u = int(threadIdx.x) % lanes; u < row_units; u += lanes) {
    if (kGather) {
      picked[u] = listed ? x[u] : Unit{};
    } else if (listed) {
      x[u] = picked[u];
    }
  }
}

using Kernel = void (*)(RowsParams, int, int64_t);
// [unit][gather]
const Kernel kKernels[4][2] = {{move_rows<uint16_t, false>, move_rows<uint16_t, true>},
                               {move_rows<uint32_t, false>, move_rows<uint32_t, true>},
                               {move_rows<uint2, false>, move_rows<uint2, true>},
                               {move_rows<uint4, false>, move_rows<uint4, true>}};

int launch_rows(const RowsParams& p, bool gather, Stream stream) {
  const int unit = common_unit(address(p.x), address(p.picked), p.row_bytes);
  const int64_t row_units = p.row_bytes / unit;
  if (p.count == 0 || row_units == 0) return 0;
  int lanes = 1;
  while (lanes < kThreads && lanes < row_units) lanes *= 2;
  const int64_t blocks = ceil_div(p.count, kThreads / lanes);
  if (blocks > INT32_MAX) return kInvalidConfiguration;
  const Kernel move_rows_of_unit = kKernels[unit_index(unit)][gather];
  return KVCACHE_LAUNCH_DEPENDENT(move_rows_of_unit, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, p, lanes,
                                  row_units);
}

}  // namespace

int active_rows(const ActiveRowsParams& p, Stream stream) {
  if (p.n > INT32_MAX) return kInvalidConfiguration;
  return KVCACHE_LAUNCH_DEPENDENT(number_rows, dim3(1), dim3(kNumberWarps * 32), kNumberWarps * sizeof(int), stream, p);
}

int gather_rows(const RowsParams& p, Stream stream) { return launch_rows(p, true, stream); }

int scatter_rows(const RowsParams& p, Stream stream) { return launch_rows(p, false, stream); }

}  // namespace kvcache::cuda
