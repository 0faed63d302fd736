// compact: the kept slots of every head move to the front, in order; all heads of a call in one launch.
//
// In place, entry i comes from slot keep[i] >= i, so an entry must not be written before those that come after it in the
// list but lie at its new place have been read. Rows of channels do not depend on one another: a block takes 64 bytes of
// every entry of one head (or its positions, or one side column) and walks along the list in tiles, through registers: all
// of a tile is read before any of it is written, and what later tiles read lies behind everything written so far. A block
// that has moved a strip of keys knows all of a page in its channels, and takes their bounds before it leaves.
#include "kernels.h"
#include "page_bounds.cuh"
#include "ptx/dependent_launch.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kThreads = 256, kBatch = 8;  // entries per thread and tile
constexpr int kStripBytes = 64;

// One head's entries in a page array, seen through two tables.
struct PagedRows {
  const int32_t *source, *target;
  int page_size;
  int64_t row_units;
  __device__ __forceinline__ int64_t from(int slot) const { return entry_offset(source, slot, page_size, row_units); }
  __device__ __forceinline__ int64_t to(int slot) const { return entry_offset(target, slot, page_size, row_units); }
};
// ... in a plain array.
struct PlainRows {
  __device__ __forceinline__ int64_t from(int slot) const { return slot; }
  __device__ __forceinline__ int64_t to(int slot) const { return slot; }
};

// Moves entries keep[0 .. n) of `data`, kLanes threads side by side per entry; a thread that is not `inside` the row only
// keeps step.
template <class Unit, int kLanes, class Rows>
__device__ __forceinline__ void move_entries(Unit* data, const Rows& rows, const int32_t* keep, int n, bool inside) {
  constexpr int kStep = kThreads / kLanes, kTile = kStep * kBatch;
  const int first = int(threadIdx.x) / kLanes;
  int64_t from[kBatch];
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    const int i = first + j * kStep;
    from[j] = inside && i < n ? rows.from(keep[i]) : -1;
  }
  for (int64_t begin = first; begin < n + first; begin += kTile) {  // the same number of rounds for every thread
    Unit moved[kBatch];
    int64_t to[kBatch], next[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      to[j] = from[j] < 0 ? -1 : rows.to(int(begin + j * kStep));
      if (from[j] != to[j]) moved[j] = data[from[j]];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {  // while the entries are on their way
      const int64_t i = begin + kTile + j * kStep;
      next[j] = inside && i < n ? rows.from(keep[i]) : -1;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (from[j] != to[j]) data[to[j]] = moved[j];
      from[j] = next[j];
    }
  }
}

// Bounds of every page that holds one of the n entries, in one unit's channels: kLanes threads side by side per page.
template <class T, int kChannels, int kLanes>
__device__ __forceinline__ void bound_strip(const CompactParams& p, const int32_t* target, int unit, int n) {
  const PagedView& view = p.view;
  const int dim = view.k_dim, channel = unit * kChannels;
  if (channel >= dim) return;
  const int pages = (n + view.page_size - 1) / view.page_size;
  for (int column = int(threadIdx.x) / kLanes; column < pages; column += kThreads / kLanes) {
    const int64_t page = target[column];
    const T* keys = static_cast<const T*>(view.k_pages) + page * view.page_size * dim + channel;  // [page_size, dim]
    ChannelBounds<T, kChannels> bounds;
    bounds.start();
    bounds.template include_rows<kBatch>(keys, min(view.page_size, n - column * view.page_size), dim);
    bounds.store(static_cast<T*>(p.bounds) + page * 2 * dim + channel, dim);
  }
}

// T is the storage's type if there are bounds to keep, else void.
template <class Unit, class T>
__global__ __launch_bounds__(kThreads) void move_strips(CompactParams p, int k_strips, int v_strips) {
  wait_for_dependencies();
  launch_dependents();
  constexpr int kLanes = kStripBytes / int(sizeof(Unit));
  const PagedView& view = p.view;
  const unsigned strips = unsigned(k_strips + v_strips) + 1 + view.n_columns;
  const int64_t item = blockIdx.x / strips;
  int strip = int(blockIdx.x % strips);
  const int32_t* keep = p.keep + item * p.keep_width;  // [keep_width]
  const int n = p.keep_counts[item];
  if (strip < k_strips + v_strips) {
    const bool keys = strip < k_strips;
    if (!keys) strip -= k_strips;
    const int row_units =
        (keys ? view.k_dim : view.v_dim) * (view.dtype == DType::kFloat32 ? 4 : 2) / int(sizeof(Unit));
    const int unit = strip * kLanes + int(threadIdx.x) % kLanes;
    const PagedRows rows{view.table + item * view.table_width, p.target_table + item * p.target_width, view.page_size,
                         row_units};
    move_entries<Unit, kLanes>(static_cast<Unit*>(keys ? view.k_pages : view.v_pages) + unit, rows, keep, n,
                               unit < row_units);
    if constexpr (!std::is_void_v<T>) {
      __syncthreads();  // the strip is in place
      if (keys) bound_strip<T, kVectorOf<Unit, T>, kLanes>(p, rows.target, unit, n);
    }
    return;
  }
  strip -= k_strips + v_strips;
  if (strip == 0) {
    move_entries<int32_t, 1>(view.positions + item * view.capacity, PlainRows{}, keep, n, true);
    if (threadIdx.x == 0) view.counts[item] = n;
  } else {
    const int64_t line = int64_t(strip - 1) * view.rows * view.heads + item;
    move_entries<float, 1>(view.columns + line * view.capacity, PlainRows{}, keep, n, true);
  }
}

using Kernel = void (*)(CompactParams, int, int);
// [without bounds, or the storage's dtype][unit]
#define KVCACHE_MOVE_STRIPS(T) \
  {move_strips<uint16_t, T>, move_strips<uint32_t, T>, move_strips<uint2, T>, move_strips<uint4, T>}
const Kernel kKernels[4][4] = {KVCACHE_MOVE_STRIPS(void), KVCACHE_MOVE_STRIPS(float), KVCACHE_MOVE_STRIPS(bf16),
                               KVCACHE_MOVE_STRIPS(f16)};
#undef KVCACHE_MOVE_STRIPS

}  // namespace

int compact(const CompactParams& p, Stream stream) {
  const PagedView& view = p.view;
  const int64_t items = int64_t(view.rows) * view.heads;
  if (items == 0) return 0;
  const int k_bytes = view.k_dim * element_bytes(view.dtype), v_bytes = view.v_dim * element_bytes(view.dtype);
  const int unit = common_unit(address(view.k_pages), address(view.v_pages), address(p.bounds), k_bytes, v_bytes);
  const int k_strips = int(ceil_div(k_bytes, kStripBytes)), v_strips = int(ceil_div(v_bytes, kStripBytes));
  const int64_t blocks = items * (k_strips + v_strips + 1 + view.n_columns);
  if (blocks > INT32_MAX) return kInvalidConfiguration;
  const Kernel move_strips_of_unit = kKernels[p.bounds == nullptr ? 0 : 1 + int(view.dtype)][unit_index(unit)];
  return KVCACHE_LAUNCH_DEPENDENT(move_strips_of_unit, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, p, k_strips,
                                  v_strips);
}

}  // namespace kvcache::cuda
