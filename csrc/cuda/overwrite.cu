// overwrite: the last entry of each head moves into the victim's slot. One launch for any number of rows and heads, so
// that the heads of all layers can be rows of one call; the bounds of the two pages that change are taken anew in it.
#include <algorithm>

#include "kernels.h"
#include "page_bounds.cuh"
#include "ptx/dependent_launch.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kThreads = 128;

constexpr int kBatch = 8;  // keys that a thread reads at once

// Bounds of the victim's page and of the page that the last entry left, from what they hold now: one thread per page and
// n neighbouring channels. A page that holds nothing any more keeps its own.
template <class T, int n>
__device__ __forceinline__ void bound_changed_pages(const OverwriteParams& p, int64_t first, int64_t items,
                                                    int block_heads) {
  const PagedView& view = p.view;
  const unsigned units = unsigned(view.k_dim) / n, jobs = 2 * units;
  for (unsigned i = threadIdx.x; i < block_heads * jobs; i += kThreads) {
    const int64_t item = first + i / jobs;
    if (item >= items) continue;
    const int victim = p.victims[item], last = view.counts[item] - 1;  // `last` entries are left
    if (victim < 0) continue;
    const int of_victim = victim / view.page_size, of_last = last / view.page_size;
    const bool second = i % jobs >= units;
    if (second && of_last == of_victim) continue;
    const int column = second ? of_last : of_victim, live = min(view.page_size, last - column * view.page_size);
    if (live <= 0) continue;
    const int64_t page = view.table[item * view.table_width + column];
    const int dim = view.k_dim, channel = int(i % units) * n;
    const T* keys = static_cast<const T*>(view.k_pages) + page * view.page_size * dim + channel;  // [page_size, dim]
    ChannelBounds<T, n> bounds;
    bounds.start();
    bounds.template include_rows<kBatch>(keys, live, dim);
    bounds.store(static_cast<T*>(p.bounds) + page * 2 * dim + channel, dim);
  }
}

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
  __syncthreads();  // everybody has read the counts, and the keys are where they belong
  if constexpr (!std::is_void_v<T>) {
    bound_changed_pages<T, kVectorOf<Unit, T>>(p, first, items, block_heads);
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
