// overwrite: the last entry of each head moves into the victim's slot. One launch for any number of rows and heads, so
// that the heads of all layers can be rows of one call.
#include <algorithm>

#include "kernels.h"
#include "memory.cuh"
#include "ptx/dependent_launch.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kThreads = 128;

// A few threads per head, block_heads heads per block: one unit of the key or value each, then positions and columns.
template <class Unit>
__global__ __launch_bounds__(kThreads) void move_last(OverwriteParams p, int block_heads, int k_units, int v_units) {
  wait_for_dependencies();
  launch_dependents();
  const PagedView& view = p.view;
  const int64_t items = int64_t(view.rows) * view.heads, first = int64_t(blockIdx.x) * block_heads;
  const unsigned units = unsigned(k_units + v_units), jobs = units + 1 + view.n_columns;
  for (unsigned i = threadIdx.x; i < block_heads * jobs; i += kThreads) {
    const int64_t item = first + i / jobs;
    const unsigned job = i % jobs;
    if (item >= items) continue;
    const int victim = p.victims[item], last = view.counts[item] - 1;
    if (victim < 0 || victim == last) continue;
    const int32_t* table = view.table + item * view.table_width;  // [table_width]
    if (job < units) {
      const bool keys = job < unsigned(k_units);
      const int row_units = keys ? k_units : v_units;
      Unit* pages = static_cast<Unit*>(keys ? view.k_pages : view.v_pages) + (keys ? job : job - k_units);
      pages[entry_offset(table, victim, view.page_size, row_units)] =
          pages[entry_offset(table, last, view.page_size, row_units)];
    } else if (job == units) {
      int32_t* positions = view.positions + item * view.capacity;  // [capacity]
      positions[victim] = positions[last];
    } else {
      float* column = view.columns + (int64_t(job - units - 1) * items + item) * view.capacity;  // [capacity]
      column[victim] = column[last];
    }
  }
  __syncthreads();  // everybody has read the counts
  for (int i = int(threadIdx.x); i < block_heads && first + i < items; i += kThreads) {
    if (p.victims[first + i] >= 0) --view.counts[first + i];
  }
}

using Kernel = void (*)(OverwriteParams, int, int, int);
const Kernel kKernels[4] = {move_last<uint16_t>, move_last<uint32_t>, move_last<uint2>, move_last<uint4>};

}  // namespace

int overwrite(const OverwriteParams& p, Stream stream) {
  const PagedView& view = p.view;
  const int64_t items = int64_t(view.rows) * view.heads;
  if (items == 0) return 0;
  const int k_bytes = view.k_dim * element_bytes(view.dtype), v_bytes = view.v_dim * element_bytes(view.dtype);
  const int unit = common_unit(address(view.k_pages), address(view.v_pages), k_bytes, v_bytes);
  const int units = (k_bytes + v_bytes) / unit;
  const int block_heads = std::max(1, kThreads / (units + 1 + view.n_columns));
  const int64_t blocks = ceil_div(items, block_heads);
  if (blocks > INT32_MAX) return kInvalidConfiguration;
  const Kernel move_last_of_unit = kKernels[unit_index(unit)];
  return KVCACHE_LAUNCH_DEPENDENT(move_last_of_unit, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, p, block_heads,
                                  k_bytes / unit, v_bytes / unit);
}

}  // namespace kvcache::cuda
