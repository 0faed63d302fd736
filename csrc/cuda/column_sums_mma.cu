// Column sums on tensor cores: entries are the rows of the products and stay in shared memory, queries stream past them,
// and each thread adds up the weights of its entries in registers.
//
// A block owns a tile of entries (no atomics) and reads the tiles of tokens of which one sees some of them, query head by query
// head. So a thread meets the weights that an entry gets from one token's query heads one after another in the same place,
// which is what the maximum over the group needs.
#include "column_sums.cuh"
#include "prefill_mma.cuh"
#include "ptx/dependent_launch.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kQueries = 64, kCopied = kQueries / kWarps;  // of a tile, and of those the ones that a warp copies
constexpr int kPairs = kQueries / 8;

// kRowTiles: tiles of 16 entries of a warp. kDim: the keys' size if known, then there is also no softcap, bias or mask;
// else 0. kMax: maximum over the group instead of the mean.
template <class T_, int kRowTiles_, int kDim_, bool kMax_>
struct ColumnConfig {
  using T = T_;
  static constexpr int kRowTiles = kRowTiles_, kDim = kDim_, kWarpRows = 16 * kRowTiles, kRows = kWarps * kWarpRows;
  static constexpr bool kMax = kMax_, kPlain = kDim > 0;
};

// What stays the same while a block works, in shared memory to save registers.
struct Facts {
  ColumnBlock block;
  QueryRange range;
  Bounds entries, warp_entries[kWarps];
};
static_assert(sizeof(Facts) <= kPrefillFactsBytes);

template <class C>
struct Memory {  // column_tiles in core/prefill_tiles.h adds this up
  typename C::T *keys, *queries;
  int width;
  Facts* facts;
  Reach *scan, *tile;     // [2][32], [stages]
  int32_t *last, *start;  // [stages][kQueries]
  float* level;           // [stages][kQueries]
  int32_t* position;      // [kRows]

  __device__ Memory(typename C::T* memory, int dim) {
    width = (dim + 63) & ~63;
    keys = memory;
    queries = keys + C::kRows * width;
    facts = reinterpret_cast<Facts*>(queries + kColumnStages * kQueries * width);
    scan = reinterpret_cast<Reach*>(reinterpret_cast<char*>(facts) + kPrefillFactsBytes);
    tile = scan + 2 * 32;
    last = reinterpret_cast<int32_t*>(tile + kColumnStages);
    start = last + kColumnStages * kQueries;
    level = reinterpret_cast<float*>(start + kColumnStages * kQueries);
    position = reinterpret_cast<int32_t*>(level + kColumnStages * kQueries);
  }
};

// The block's entries: keys, zeros where there is none, and positions.
template <class C>
__device__ __forceinline__ void load_entries(const AttentionParams& p, const ColumnBlock& block,
                                             const Memory<C>& memory, int dim) {
  using T = typename C::T;
  const PagedView& view = p.view;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int m = warp * C::kWarpRows + lane % C::kWarpRows, slot = block.first + m;
  int64_t offset = -1;
  if (m < block.entries) {
    const int page = slot / view.page_size;
    const int64_t line = int64_t(view.table[block.item * view.table_width + page]) * view.page_size;
    offset = (line + slot - page * view.page_size) * dim;
  }
  if (lane < C::kWarpRows) {
    memory.position[m] = m < block.entries ? view.positions[block.item * view.capacity + slot] : kNowhere;
  }
  copy_rows<T, C::kWarpRows>(static_cast<const T*>(view.k_pages), dim, dim, offset, memory.keys, warp * C::kWarpRows,
                             memory.width);
}

__device__ __forceinline__ Bounds bounds_of(const int32_t* position, int begin, int end, int entries) {
  Bounds bounds{kNowhere, INT32_MIN};
  for (int m = begin + int(threadIdx.x) % 32; m < min(end, entries); m += 32) {
    bounds.low = min(bounds.low, position[m]), bounds.high = max(bounds.high, position[m]);
  }
  return {warp_min(bounds.low), warp_max(bounds.high)};
}

// Products become weights. `first` is the tile's first token, `check`: not all of its queries see all entries.
template <class C>
__device__ __forceinline__ void weigh(const AttentionParams& p, const ColumnBlock& block, const Memory<C>& memory,
                                      int stage, int query_head, int first, bool check,
                                      float (&scores)[C::kRowTiles][kPairs][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = warp * C::kWarpRows + lane / 4, column = lane % 4 * 2;
  const float* levels = memory.level + stage * kQueries + column;
  float factor = p.scale * kLog2E;
  auto each = [&](auto&& change) {  // change(score, row tile, half, query counted from this lane's first)
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
#pragma unroll
      for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
        for (int x = 0; x < 4; ++x) change(scores[i][j][x], i, x / 2, j * 8 + x % 2);
      }
    }
  };
  if constexpr (!C::kPlain) {
    if (p.softcap > 0) {
      const float to_cap = 2 * kLog2E * p.scale / p.softcap, from_cap = p.softcap * kLog2E;
      each([&](float& x, int, int, int) { x = capped(x, to_cap, from_cap); });
      factor = 1;
    }
  }
  float bias[C::kRowTiles][2] = {};
  if constexpr (!C::kPlain) {
    if (p.bias) {
      const int head = shared_head(p.bias_heads, p, block.head, query_head);
      const float* line = p.bias + (int64_t(block.row) * p.bias_heads + head) * p.view.capacity + block.first;
#pragma unroll
      for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int m = first_row + i * 16 + r * 8;
          bias[i][r] = m < block.entries ? fmaxf(kBuried, line[m] * kLog2E) : 0.0f;
        }
      }
    }
  }
  each([&](float& x, int i, int r, int query) {
    const float base = C::kPlain ? -levels[query] : bias[i][r] - levels[query];
    x = fast_exp2(fmaf(x, factor, base));
  });
  if (check) {
    const int32_t *last = memory.last + stage * kQueries + column, *start = memory.start + stage * kQueries + column;
    each([&](float& x, int i, int r, int query) {
      const int position = memory.position[first_row + i * 16 + r * 8];
      if (position > last[query] || position < start[query]) x = 0;
    });
  }
  if constexpr (!C::kPlain) {
    if (p.mask) {
      const int64_t line = int64_t(block.row) * p.mask_heads + (p.mask_heads == 1 ? 0 : block.head);
      each([&](float& x, int i, int r, int query) {
        const int m = first_row + i * 16 + r * 8, token = first + column + query;
        if (m >= block.entries || token >= p.tokens) return;
        if (!p.mask[(line * p.tokens + token) * p.view.capacity + block.first + m]) x = 0;
      });
    }
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads, C::kMax ? 2 : 0)
    column_sums_kernel(ColumnSumsParams sums, ColumnTiles tiles) {
  using T = typename C::T;
  KVCACHE_DYNAMIC_SHARED(T, shared);
  const AttentionParams& p = sums.attention;
  const int dim = C::kPlain ? C::kDim : p.view.k_dim;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Memory<C> memory(shared, dim);
  Facts& facts = *memory.facts;
  const ColumnBlock& block = facts.block;
  const QueryRange& range = facts.range;
  if (threadIdx.x == 0) {
    facts.block = column_block(sums, tiles);
    facts.range = query_range(sums, tiles, block.row);
  }
  __syncthreads();
  if (block.entries <= 0 || block.piece >= range.pieces) {  // add_pieces reads neither
    for (int m = threadIdx.x; tiles.splits == 1 && m < C::kRows && block.first + m < p.view.capacity; m += kThreads) {
      sums_of(sums, tiles, block)[m] = 0;
    }
    return;
  }
  load_entries(p, block, memory, dim);
  __syncthreads();
  const Bounds warp_bounds = bounds_of(memory.position, warp * C::kWarpRows, (warp + 1) * C::kWarpRows, block.entries);
  const Bounds bounds = bounds_of(memory.position, 0, C::kRows, block.entries);
  if (lane == 0) facts.warp_entries[warp] = warp_bounds;
  if (threadIdx.x == 0) facts.entries = bounds;
  __syncthreads();

  const int per_piece = (range.tiles - range.first_tile + range.pieces - 1) / range.pieces;
  const int first_tile = range.first_tile + block.piece * per_piece;
  QueryScan<kQueries, kThreads> scan(memory.scan, first_tile, min(first_tile + per_piece, range.tiles));
  // The tile of tokens and the query head that are copied next, and this lane's query of them, looked up one step ahead.
  int tile = -1, head = 0;
  int64_t offset = -1;
  ColumnQuery query{};
  auto look_up = [&] {
    if (tile < 0 || ++head == block.group) {
      tile = scan.pull(p, range, block.row, facts.entries);
      head = 0;
      if (tile < 0) return;
    }
    const int token = tile * kQueries + warp * kCopied + lane % kCopied, query_head = block.head * block.group + head;
    query = column_query(sums, range, block.row, query_head, token);
    offset = -1;  // rows of zeros for queries without weight: padding may hold anything
    if (query.level != kInfinity) {
      offset = block.row * p.q.stride[0] + query_head * p.q.stride[1] + token * p.q.stride[2];
    }
  };
  auto copy = [&](int stage) {
    if (tile >= 0) {
      if (lane < kCopied) {
        const int place = stage * kQueries + warp * kCopied + lane;
        memory.last[place] = query.last, memory.start[place] = query.start, memory.level[place] = query.level;
      }
      if (threadIdx.x == 0) memory.tile[stage] = scan.of(tile);
      copy_rows<T, kCopied>(static_cast<const T*>(p.q.data), dim, dim, offset,
                            memory.queries + stage * kQueries * memory.width, warp * kCopied, memory.width);
    }
    cp_async_commit();
  };

  float total[C::kRowTiles][2] = {}, top[C::kMax ? C::kRowTiles : 1][kPairs][4];
  auto each = [&](auto&& change) {
#pragma unroll
    for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
#pragma unroll
        for (int x = 0; x < 4; ++x) change(i, j, x);
      }
    }
  };
  static_assert(kColumnStages == 2);
  int stage = 0;
  look_up();
  int here = tile, here_head = head;
  copy(0);
  if (tile >= 0) look_up();
  while (here >= 0) {
    cp_async_wait<0>();
    __syncthreads();  // this step's queries are there for all, and the step before is done with
    const int next = tile, next_head = head;
    copy(stage ^ 1);
    if (tile >= 0) look_up();
    const Reach reach = memory.tile[stage];
    const Bounds mine = facts.warp_entries[warp];
    if (!reach.hides(mine)) {
      float scores[C::kRowTiles][kPairs][4];
      multiply_rows<T, C::kRowTiles, kQueries, C::kDim>(memory.keys, warp * C::kWarpRows,
                                                        memory.queries + stage * kQueries * memory.width, 0,
                                                        memory.width, dim, scores);
      weigh<C>(p, block, memory, stage, block.head * block.group + here_head, here * kQueries, !reach.shows(mine),
               scores);
      if constexpr (C::kMax) {
        if (here_head == 0) each([&](int i, int j, int x) { top[i][j][x] = scores[i][j][x]; });
        else each([&](int i, int j, int x) { top[i][j][x] = fmaxf(top[i][j][x], scores[i][j][x]); });
        if (here_head + 1 == block.group) each([&](int i, int j, int x) { total[i][x / 2] += top[i][j][x]; });
      } else {
        each([&](int i, int j, int x) { total[i][x / 2] += scores[i][j][x]; });
      }
    }
    here = next, here_head = next_head;
    stage ^= 1;
  }
  cp_async_wait<0>();
  launch_dependents();

  float* target = sums_of(sums, tiles, block);
  const float share = C::kMax ? 1.0f : 1.0f / block.group;
#pragma unroll
  for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = total[i][r];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      const int m = warp * C::kWarpRows + i * 16 + r * 8 + lane / 4;
      if (lane % 4 == 0 && block.first + m < p.view.capacity) target[m] = m < block.entries ? sum * share : 0.0f;
    }
  }
}

template <class C>
int launch_columns(const ColumnSumsParams& sums, const ColumnTiles& tiles, Stream stream) {
  return KVCACHE_LAUNCH((column_sums_kernel<C>), column_blocks(sums, tiles), kThreads, tiles.shared_bytes, stream, sums,
                        tiles);
}

template <class T>
int choose(const ColumnSumsParams& sums, const ColumnTiles& tiles, Stream stream) {
  const AttentionParams& p = sums.attention;
  const int dim = p.view.k_dim;
  if (sums.reduce_max) {
    return dim > 128 ? launch_columns<ColumnConfig<T, 1, 0, true>>(sums, tiles, stream)
                     : launch_columns<ColumnConfig<T, 2, 0, true>>(sums, tiles, stream);
  }
  if (p.softcap == 0 && !p.bias && !p.mask) {
    if (dim == 64) return launch_columns<ColumnConfig<T, 2, 64, false>>(sums, tiles, stream);
    if (dim == 128) return launch_columns<ColumnConfig<T, 2, 128, false>>(sums, tiles, stream);
    if (dim == 256) return launch_columns<ColumnConfig<T, 1, 256, false>>(sums, tiles, stream);
  }
  return dim > 128 ? launch_columns<ColumnConfig<T, 1, 0, false>>(sums, tiles, stream)
                   : launch_columns<ColumnConfig<T, 2, 0, false>>(sums, tiles, stream);
}

}  // namespace

int column_sums_mma(const ColumnSumsParams& sums, const ColumnTiles& tiles, Stream stream) {
  return sums.attention.view.dtype == DType::kBFloat16 ? choose<bf16>(sums, tiles, stream)
                                                       : choose<f16>(sums, tiles, stream);
}

}  // namespace kvcache::cuda
