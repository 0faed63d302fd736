// evict: the worst candidate of each head over its budget leaves, and the head's last entry moves into its slot. All heads
// of all layers in one launch: a block finds a head's victim and moves the entry. Where heads are few and long
// (core/victim_plan.h), or what decides is itself rewritten, a launch before it leaves the worst of each piece of a head.
#include <algorithm>

#include "../core/victim_plan.h"
#include "kernels.h"
#include "move_last.cuh"
#include "ptx/dependent_launch.cuh"
#include "worst_candidate.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kThreads = 256;

// One layer, by value in the kernel's parameters: no copy to the device, and a captured graph keeps it.
struct Layer {
  const int32_t* table;        // [rows, heads, table_width]
  int32_t* counts;             // [rows, heads]
  int32_t* positions;          // [rows, heads, capacity]
  float* columns;              // [n_columns, rows, heads, capacity]
  const float* scores;         // [rows, heads, capacity] of any strides, or null: the oldest leaves
  const int32_t* budgets;      // [rows, heads] of any strides
  const int32_t *first, *end;  // [rows]
  int64_t scores_stride[2];
  int32_t budgets_stride[2];
  int32_t heads, table_width;
};

struct Shared {
  void *k_pages, *v_pages, *bounds;
  Worst* parts;  // [layers, most items of a layer, pieces], or null: each block looks for its head's victim itself
  int64_t piece;
  int32_t pieces, most_items;
  int32_t rows, n_columns, page_size, k_dim, k_units, v_units;
};

constexpr int kParameterBytes = 4096;  // of a kernel, on every GPU and driver
constexpr int kLayers = int((kParameterBytes - sizeof(Shared)) / sizeof(Layer));
static_assert(kLayers >= 40, "the layers of most models in one launch");

struct Arguments {
  Layer layer[kLayers];
  Shared all;
};
static_assert(sizeof(Arguments) <= kParameterBytes);

// Which of a layer's heads a block works on.
struct Head {
  int64_t row, head;
  int count;

  __device__ __forceinline__ Head(const Layer& layer, int item)
      : row(unsigned(item) / unsigned(layer.heads)), head(unsigned(item) % unsigned(layer.heads)) {
    count = layer.counts[item];
  }
  __device__ __forceinline__ bool over_budget(const Layer& layer) const {
    return count > max(layer.budgets[row * layer.budgets_stride[0] + head * layer.budgets_stride[1]], 0);
  }
  __device__ __forceinline__ Worst search(const Layer& layer, const int32_t* positions, int64_t begin,
                                          int until) const {
    const float* scores = layer.scores;  // [capacity], the head's
    if (scores != nullptr) scores += row * layer.scores_stride[0] + head * layer.scores_stride[1];
    return worst_of_slots<kThreads>(positions, scores, begin, until, layer.first[row], layer.end[row]);
  }
};

// Block (b, layer) looks at piece b % pieces of head b / pieces.
__global__ __launch_bounds__(kThreads) void worst_of_layers(const __grid_constant__ Arguments p) {
  wait_for_dependencies();
  launch_dependents();
  KVCACHE_DYNAMIC_SHARED(Worst, of_warp);  // [kThreads / 32]
  const Layer& layer = p.layer[blockIdx.y];
  const int item = int(blockIdx.x / unsigned(p.all.pieces));
  if (item >= p.all.rows * layer.heads) return;
  const Head head(layer, item);
  const int64_t capacity = int64_t(layer.table_width) * p.all.page_size;
  const int64_t begin = int64_t(blockIdx.x % unsigned(p.all.pieces)) * p.all.piece;
  const int until = head.over_budget(layer) ? int(min(int64_t(head.count), begin + p.all.piece)) : 0;
  Worst worst = head.search(layer, layer.positions + item * capacity, begin, until);
  worst.reduce_block<kThreads>(of_warp);
  if (threadIdx.x == 0) p.all.parts[blockIdx.y * int64_t(gridDim.x) + blockIdx.x] = worst;
}

// Block (item, layer). T is the storage's type if there are bounds to keep, else void.
template <class Unit, class T>
__global__ __launch_bounds__(kThreads, 4) void evict_worst(const __grid_constant__ Arguments p) {
  wait_for_dependencies();
  launch_dependents();
  KVCACHE_DYNAMIC_SHARED(Worst, of_warp);  // [kThreads / 32]
  const Layer& layer = p.layer[blockIdx.y];
  const Shared& all = p.all;
  const int item = int(blockIdx.x), items = all.rows * layer.heads;
  if (item >= items) return;
  const Head head(layer, item);
  // With parts the launch before has looked at the budgets, and scores and budgets may already be other heads' new ones.
  if (all.parts == nullptr ? !head.over_budget(layer) : head.count == 0) return;
  const int last = head.count - 1;
  const int64_t capacity = int64_t(layer.table_width) * all.page_size;
  const HeadEntries<Unit> entries{static_cast<Unit*>(all.k_pages),
                                  static_cast<Unit*>(all.v_pages),
                                  layer.table + int64_t(item) * layer.table_width,
                                  layer.positions + item * capacity,
                                  layer.columns + item * capacity,
                                  items * capacity,
                                  all.page_size,
                                  all.k_units,
                                  all.v_units};
  // The last entry is on its way while the victim is looked for.
  const unsigned units = unsigned(all.k_units + all.v_units), thread = threadIdx.x;
  Unit carried{};
  if (thread < units) carried = *entries.unit(thread, last);
  Worst worst{0, -1};
  if (all.parts == nullptr) {
    worst = head.search(layer, entries.positions, 0, head.count);
  } else {
    const Worst* parts = all.parts + (int64_t(blockIdx.y) * all.most_items + item) * all.pieces;  // [pieces]
    for (int i = int(thread); i < all.pieces; i += kThreads) worst.offer(parts[i].key, parts[i].slot);
  }
  worst.reduce_block<kThreads>(of_warp);  // everybody has read counts, positions and scores
  const int victim = worst.slot;
  if (victim < 0) return;
  if (victim != last) {
    if (thread < units) *entries.unit(thread, victim) = carried;
    for (unsigned i = thread + kThreads; i < units; i += kThreads) *entries.unit(i, victim) = *entries.unit(i, last);
    for (unsigned i = thread; i < 1 + unsigned(all.n_columns); i += kThreads) entries.move_beside(i, victim, last);
  }
  if (thread == 0) layer.counts[item] = last;
  if constexpr (!std::is_void_v<T>) {
    __syncthreads();  // the keys are where they belong
    constexpr int n = kVectorOf<Unit, T>;
    for (unsigned i = thread; i < 2 * (unsigned(all.k_dim) / n); i += kThreads) {
      bound_changed_page<T, n>(i, static_cast<const T*>(all.k_pages), static_cast<T*>(all.bounds), entries.table,
                               all.page_size, all.k_dim, victim, last);
    }
  }
}

using Kernel = void (*)(Arguments);
// [without bounds, or the storage's dtype][unit]
#define KVCACHE_EVICT(T) \
  {evict_worst<uint16_t, T>, evict_worst<uint32_t, T>, evict_worst<uint2, T>, evict_worst<uint4, T>}
const Kernel kKernels[4][4] = {KVCACHE_EVICT(void), KVCACHE_EVICT(float), KVCACHE_EVICT(bf16), KVCACHE_EVICT(f16)};
#undef KVCACHE_EVICT

bool overlap(const void* a, int64_t a_bytes, const void* b, int64_t b_bytes) {
  return a != nullptr && address(a) < address(b) + b_bytes && address(b) < address(a) + a_bytes;
}

// Whether a block could move what another head's block has yet to read: scores or budgets that are views of the columns or
// counts, other than of the head's own.
bool reads_what_others_move(const VictimParams& p, const PagedView& view) {
  const int64_t heads = view.heads, line = int64_t(view.rows) * heads;
  auto bytes = [&](const int64_t (&stride)[2], int64_t inner) {  // of 4-byte elements
    return 4 * (int64_t(view.rows - 1) * stride[0] + (heads - 1) * stride[1] + inner);
  };
  if (p.scores != nullptr && overlap(p.scores, bytes(p.scores_stride, view.capacity), view.columns,
                                     4 * view.n_columns * line * view.capacity)) {
    const bool own = (view.rows == 1 || p.scores_stride[0] == heads * view.capacity) &&
                     (heads == 1 || p.scores_stride[1] == view.capacity) &&
                     (p.scores - view.columns) % (line * view.capacity) == 0;
    if (!own) return true;
  }
  return overlap(p.budgets, bytes(p.budgets_stride, 1), view.counts, 4 * line);
}

struct Plan {
  bool cut;  // a launch before the other
  VictimPlan pieces;
  int64_t most_items;
};

Plan plan_of(const EvictParams& p, int begin, int end) {
  int64_t items = 0, capacity = 0;
  Plan plan{};
  for (int i = begin; i < end; ++i) {
    const PagedView& view = p.move[i].view;
    const int64_t own = int64_t(view.rows) * view.heads;
    if (own == 0) continue;
    items += own;
    plan.most_items = std::max(plan.most_items, own);
    capacity = std::max(capacity, view.capacity);
    plan.cut = plan.cut || reads_what_others_move(p.choice[i], view);
  }
  plan.pieces = victim_plan(1, items, capacity);
  plan.cut = plan.cut || plan.pieces.pieces > 1;
  return plan;
}

int evict_layers(const EvictParams& p, int begin, int end, void* scratch, Stream stream) {
  const Plan plan = plan_of(p, begin, end);
  if (plan.most_items == 0) return 0;
  if (plan.most_items * plan.pieces.pieces > INT32_MAX) return kInvalidConfiguration;
  const PagedView& view = p.move[begin].view;
  void* const bounds = p.move[begin].bounds;
  const int k_bytes = view.k_dim * element_bytes(view.dtype), v_bytes = view.v_dim * element_bytes(view.dtype);
  const int unit = common_unit(address(view.k_pages), address(view.v_pages), address(bounds), k_bytes, v_bytes);
  Arguments a{};
  a.all = {view.k_pages,
           view.v_pages,
           bounds,
           plan.cut ? static_cast<Worst*>(scratch) : nullptr,
           plan.pieces.piece,
           int32_t(plan.pieces.pieces),
           int32_t(plan.most_items),
           view.rows,
           view.n_columns,
           view.page_size,
           view.k_dim,
           k_bytes / unit,
           v_bytes / unit};
  for (int i = begin; i < end; ++i) {
    const VictimParams& choice = p.choice[i];
    const PagedView& own = p.move[i].view;
    for (const int64_t stride : choice.budgets_stride) {
      if (stride > INT32_MAX) return kInvalidConfiguration;
    }
    a.layer[i - begin] = {own.table,
                          own.counts,
                          own.positions,
                          own.columns,
                          choice.scores,
                          choice.budgets,
                          choice.first,
                          choice.end,
                          {choice.scores_stride[0], choice.scores_stride[1]},
                          {int32_t(choice.budgets_stride[0]), int32_t(choice.budgets_stride[1])},
                          own.heads,
                          own.table_width};
  }
  const unsigned layers = unsigned(end - begin);
  constexpr size_t kSharedBytes = kThreads / 32 * sizeof(Worst);
  if (plan.cut) {
    const dim3 blocks(unsigned(plan.most_items * plan.pieces.pieces), layers);
    const int error = KVCACHE_LAUNCH_DEPENDENT(worst_of_layers, blocks, dim3(kThreads), kSharedBytes, stream, a);
    if (error != 0) return error;
  }
  const Kernel evict_worst_of_unit = kKernels[bounds == nullptr ? 0 : 1 + int(view.dtype)][unit_index(unit)];
  return KVCACHE_LAUNCH_DEPENDENT(evict_worst_of_unit, dim3(unsigned(plan.most_items), layers), dim3(kThreads),
                                  kSharedBytes, stream, a);
}

}  // namespace

int64_t evict_scratch(const EvictParams& p) {
  int64_t most = 0;  // the launches follow one another and use the same
  for (int begin = 0; begin < p.layers; begin += kLayers) {
    const int end = std::min(p.layers, begin + kLayers);
    const Plan plan = plan_of(p, begin, end);
    if (plan.cut) most = std::max(most, (end - begin) * plan.most_items * plan.pieces.pieces * int64_t(sizeof(Worst)));
  }
  return most;
}

int evict(const EvictParams& p, void* scratch, Stream stream) {
  for (int begin = 0; begin < p.layers; begin += kLayers) {
    const int error = evict_layers(p, begin, std::min(p.layers, begin + kLayers), scratch, stream);
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace kvcache::cuda
