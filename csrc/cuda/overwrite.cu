// overwrite: the last entry of each head moves into the victim's slot. One launch for any number of rows and heads, so
// that the heads of all layers can be rows of one call; the bounds of the two pages that change are taken anew in it.
#include <algorithm>

#include "kernels.h"
#include "move_last.cuh"
#include "ptx/dependent_launch.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kThreads = 128;

// A few threads per head, block_heads heads per block: one unit of the key or value each, then positions and columns. T is
// the storage's type if there are bounds to keep, else void.
template <class Unit, class T>
__global__ __launch_bounds__(kThreads, 8) void move_last(OverwriteParams p, int block_heads, int k_units, int v_units) {
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
    const HeadEntries<Unit> head{static_cast<Unit*>(view.k_pages),
                                 static_cast<Unit*>(view.v_pages),
                                 view.table + item * view.table_width,
                                 view.positions + item * view.capacity,
                                 view.columns + item * view.capacity,
                                 items * view.capacity,
                                 view.page_size,
                                 k_units,
                                 v_units};
    if (job < units) {
      *head.unit(job, victim) = *head.unit(job, last);
    } else {
      head.move_beside(job - units, victim, last);
    }
  }
  __syncthreads();  // everybody has read the counts, and the keys are where they belong
  if constexpr (!std::is_void_v<T>) {
    constexpr int n = kVectorOf<Unit, T>;
    const unsigned parts = 2 * (unsigned(view.k_dim) / n);
    for (unsigned i = threadIdx.x; i < block_heads * parts; i += kThreads) {
      const int64_t item = first + i / parts;
      if (item >= items || p.victims[item] < 0) continue;
      bound_changed_page<T, n>(i % parts, static_cast<const T*>(view.k_pages), static_cast<T*>(p.bounds),
                               view.table + item * view.table_width, view.page_size, view.k_dim, p.victims[item],
                               view.counts[item] - 1);
    }
    __syncthreads();
  }
  for (int i = int(threadIdx.x); i < block_heads && first + i < items; i += kThreads) {
    if (p.victims[first + i] >= 0) --view.counts[first + i];
  }
}

using Kernel = void (*)(OverwriteParams, int, int, int);
// [without bounds, or the storage's dtype][unit]
#define KVCACHE_MOVE_LAST(T) {move_last<uint16_t, T>, move_last<uint32_t, T>, move_last<uint2, T>, move_last<uint4, T>}
const Kernel kKernels[4][4] = {KVCACHE_MOVE_LAST(void), KVCACHE_MOVE_LAST(float), KVCACHE_MOVE_LAST(bf16),
                               KVCACHE_MOVE_LAST(f16)};
#undef KVCACHE_MOVE_LAST

}  // namespace

int overwrite(const OverwriteParams& p, Stream stream) {
  const PagedView& view = p.view;
  const int64_t items = int64_t(view.rows) * view.heads;
  if (items == 0) return 0;
  const int k_bytes = view.k_dim * element_bytes(view.dtype), v_bytes = view.v_dim * element_bytes(view.dtype);
  const int unit = common_unit(address(view.k_pages), address(view.v_pages), address(p.bounds), k_bytes, v_bytes);
  const int units = (k_bytes + v_bytes) / unit;
  const int block_heads = std::max(1, kThreads / (units + 1 + view.n_columns));
  const int64_t blocks = ceil_div(items, block_heads);
  if (blocks > INT32_MAX) return kInvalidConfiguration;
  const Kernel move_last_of_unit = kKernels[p.bounds == nullptr ? 0 : 1 + int(view.dtype)][unit_index(unit)];
  return KVCACHE_LAUNCH_DEPENDENT(move_last_of_unit, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, p, block_heads,
                                  k_bytes / unit, v_bytes / unit);
}

}  // namespace kvcache::cuda
