// append: new tokens behind the entries of each head, with positions, side columns, counts and page bounds.
//
// One token per row (decode): one launch, in which a few threads serve each head.
//
// More tokens: which slot a token gets depends on how many before it are stored, so a first, small launch numbers them:
// one warp or block per head writes the complement ~t of each stored token's number t into the position of its slot and
// raises the count. The second launch copies, one thread per vector of channels of a page, and puts the real position in
// place. Negative positions are thus the mark of a new entry (entries are stored only at positions >= 0), and the slots
// that the launch has to look at are counted back from the end of each head: nothing else has to pass between the two.
// A page's bounds belong to the thread that copies those channels of all its new keys.
#include <algorithm>

#include "block_ranks.cuh"
#include "kernels.h"
#include "page_bounds.cuh"
#include "ptx/dependent_launch.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTileSlots = 16;  // slots of one page that one thread copies, unless bounds want the page whole

// A thread's share of a head's entries: n neighbouring channels of the keys or of the values.
struct Share {
  const Strided4* source;
  int64_t offset;  // of the head's first token, in elements, the channel included
  void* pages;
  void* bounds;  // null for values and where nobody wants them
  int dim, channel;
};

template <int n>
__device__ __forceinline__ Share share_of(const AppendParams& p, int64_t item, int unit) {
  const int key_units = p.view.k_dim / n;
  const bool keys = unit < key_units;
  Share share;
  share.source = keys ? &p.k : &p.v;
  share.pages = keys ? p.view.k_pages : p.view.v_pages;
  share.bounds = keys ? p.bounds : nullptr;
  share.dim = keys ? p.view.k_dim : p.view.v_dim;
  share.channel = (keys ? unit : unit - key_units) * n;
  share.offset =
      item / p.view.heads * share.source->stride[0] + item % p.view.heads * share.source->stride[1] + share.channel;
  return share;
}

// f(typed pointer): the element type of a given tensor is not known at compile time.
template <class F>
__device__ __forceinline__ void with_type(const void* data, DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<const float*>(data));
    case DType::kBFloat16:
      return f(static_cast<const bf16*>(data));
    case DType::kFloat16:
      return f(static_cast<const f16*>(data));
  }
}

// --- one token per row ---------------------------------------------------------------------------------------------

template <class T, int n>
__device__ __forceinline__ void append_token(const AppendParams& p, int64_t item, int unit) {
  const PagedView& view = p.view;
  const Share share = share_of<n>(p, item, unit);
  Pack<T, n> entry{};  // loaded before its place is known: one round trip to memory less
  with_type(share.source->data, share.source->dtype, [&](auto* data) { entry = load_as<T, n>(data + share.offset); });
  if (p.new_positions[item / view.heads] < 0) return;
  const int slot = view.counts[item];
  const int column = unsigned(slot) / unsigned(view.page_size), inside = slot - column * view.page_size;
  const int64_t page = view.table[item * view.table_width + column];
  T* pages = static_cast<T*>(share.pages) + share.channel;
  *reinterpret_cast<Pack<T, n>*>(pages + (page * view.page_size + inside) * share.dim) = entry;
  if (share.bounds) {
    T* stored = static_cast<T*>(share.bounds) + page * 2 * share.dim + share.channel;
    ChannelBounds<T, n> bounds;
    bounds.start();
    if (inside > 0) bounds.load(stored, share.dim);
    bounds.include(entry);
    bounds.store(stored, share.dim);
  }
}

template <class T, int n>
__global__ __launch_bounds__(kThreads) void append_one(AppendParams p, int block_heads) {
  wait_for_dependencies();
  launch_dependents();
  const PagedView& view = p.view;
  const int64_t items = int64_t(view.rows) * view.heads, first = int64_t(blockIdx.x) * block_heads;
  const int units = (view.k_dim + view.v_dim) / n;
  for (unsigned i = threadIdx.x; i < unsigned(block_heads) * units; i += kThreads) {
    const int64_t item = first + i / units;
    if (item < items) append_token<T, n>(p, item, int(i % units));
  }
  for (unsigned i = threadIdx.x; i < unsigned(block_heads) * (1 + view.n_columns); i += kThreads) {
    const int64_t item = first + i / (1 + view.n_columns);
    const int column = int(i % (1 + view.n_columns)) - 1;
    if (item >= items) continue;
    const int position = p.new_positions[item / view.heads], slot = view.counts[item];
    if (position < 0) continue;
    if (column < 0) {
      view.positions[item * view.capacity + slot] = position;
    } else {
      const int64_t line = column * items + item;
      view.columns[line * view.capacity + slot] = p.new_columns ? p.new_columns[line] : 0.0f;
    }
  }
  __syncthreads();  // everybody has read the counts
  for (int i = int(threadIdx.x); i < block_heads && first + i < items; i += kThreads) {
    if (p.new_positions[(first + i) / view.heads] >= 0) ++view.counts[first + i];
  }
}

// --- many tokens per row -------------------------------------------------------------------------------------------

constexpr int kNumberPerLane = 16;

// Writes ~t into the position of the slot of each stored token t and raises the count; kHeadWarps warps per head.
template <int kHeadWarps>
__global__ __launch_bounds__(kHeadWarps == 1 ? kThreads : kHeadWarps * 32) void number_tokens(AppendParams p) {
  wait_for_dependencies();
  launch_dependents();
  KVCACHE_DYNAMIC_SHARED(int, totals);  // [kHeadWarps]
  const PagedView& view = p.view;
  constexpr bool kAlone = kHeadWarps == 1;
  using Ranks = BlockRanks<kHeadWarps, kNumberPerLane>;
  const int block_warp = int(threadIdx.x) / 32, warp = kAlone ? 0 : block_warp;
  const int64_t item = kAlone ? int64_t(blockIdx.x) * (kThreads / 32) + block_warp : blockIdx.x;
  if (item >= int64_t(view.rows) * view.heads) return;                            // with its whole warp
  const int32_t* new_positions = p.new_positions + item / view.heads * p.tokens;  // [tokens]
  int32_t* positions = view.positions + item * view.capacity;                     // [capacity]
  int slot = view.counts[item];
  for (int64_t segment = 0; segment < p.tokens; segment += Ranks::kSegment) {
    bool stored[kNumberPerLane];
    int rank[kNumberPerLane];
#pragma unroll
    for (int j = 0; j < kNumberPerLane; ++j) {
      const int64_t t = segment + Ranks::element(warp, j);
      stored[j] = t < p.tokens && new_positions[t] >= 0;
    }
    const int all = Ranks::rank(warp, stored, rank, totals);
#pragma unroll
    for (int j = 0; j < kNumberPerLane; ++j) {
      if (stored[j]) positions[slot + rank[j]] = ~int(segment + Ranks::element(warp, j));
    }
    slot += all;
  }
  if constexpr (kAlone) __syncwarp();  // everybody has read the count; with more warps the barriers of rank() say so
  if (int(threadIdx.x) % 32 == 0 && warp == 0) view.counts[item] = slot;
}

// A piece of a page: the unit of work of append_many.
struct Tile {
  int64_t item;
  int begin, end;  // slots; empty if nothing in it is new
  int64_t page;
};

// tile_slots divides pages into tiles_per_page tiles. A block's tiles are numbered back from the end of each head.
__device__ __forceinline__ Tile tile_at(const PagedView& view, int64_t number, int head_tiles, int tile_slots,
                                        int tiles_per_page) {
  Tile tile{number / head_tiles, 0, 0, 0};
  if (tile.item >= int64_t(view.rows) * view.heads) return tile;
  const int count = view.counts[tile.item];
  if (count == 0) return tile;
  const int last = count - 1, last_column = last / view.page_size;
  const int64_t at =
      int64_t(last_column) * tiles_per_page + (last - last_column * view.page_size) / tile_slots - number % head_tiles;
  if (at < 0) return tile;
  const int column = int(at / tiles_per_page), part = int(at - int64_t(column) * tiles_per_page);
  const int begin = column * view.page_size + part * tile_slots;
  const int end = min(begin + min(tile_slots, view.page_size - part * tile_slots), count);
  const int32_t* positions = view.positions + tile.item * view.capacity;
  if (positions[end - 1] >= 0) return tile;  // new entries lie behind all others
  tile.begin = begin;
  tile.end = end;
  tile.page = view.table[tile.item * view.table_width + column];
  return tile;
}

template <class T, int n, bool kBounds, int kBatch, class From>  // kBatch: loads in flight
__device__ __forceinline__ void copy_tile(const AppendParams& p, const Tile& tile, const Share& share,
                                          const From* source) {
  const int page_size = p.view.page_size, first = tile.begin / page_size * page_size;
  const int32_t* positions = p.view.positions + tile.item * p.view.capacity;  // [capacity]
  const int64_t step = share.source->stride[2];
  T* page = static_cast<T*>(share.pages) + tile.page * page_size * share.dim + share.channel;  // [page_size, dim]
  const bool bounded = kBounds && share.bounds != nullptr;
  T* stored = bounded ? static_cast<T*>(share.bounds) + tile.page * 2 * share.dim + share.channel : nullptr;
  ChannelBounds<T, n> bounds;
  bounds.start();
  if (bounded && positions[first] >= 0) bounds.load(stored, share.dim);
#pragma unroll 1
  for (int begin = tile.begin; begin < tile.end; begin += kBatch) {
    Pack<T, n> entry[kBatch];
    bool fresh[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int token = begin + j < tile.end ? ~positions[begin + j] : -1;
      fresh[j] = token >= 0;
      if (fresh[j]) entry[j] = load_as<T, n>(source + token * step);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (!fresh[j]) continue;
      *reinterpret_cast<Pack<T, n>*>(page + int64_t(begin + j - first) * share.dim) = entry[j];
      if (bounded) bounds.include(entry[j]);
    }
  }
  if (bounded) bounds.store(stored, share.dim);
}

// kSame: keys and values are given in the pages' type, the usual case; else the type is looked up per thread.
template <class T, int n, bool kBounds, bool kSame>
__global__ __launch_bounds__(kThreads, 1) void append_many(AppendParams p, int head_tiles, int block_tiles,
                                                           int tile_slots, int tiles_per_page) {
  wait_for_dependencies();
  launch_dependents();
  const PagedView& view = p.view;
  const int64_t first = int64_t(blockIdx.x) * block_tiles;
  const int units = (view.k_dim + view.v_dim) / n;
  for (unsigned i = threadIdx.x; i < unsigned(block_tiles) * units; i += kThreads) {
    const Tile tile = tile_at(view, first + i / units, head_tiles, tile_slots, tiles_per_page);
    if (tile.begin == tile.end) continue;
    const Share share = share_of<n>(p, tile.item, int(i % units));
    if constexpr (kSame) {
      copy_tile<T, n, kBounds, kBounds ? 4 : 8>(p, tile, share,
                                                static_cast<const T*>(share.source->data) + share.offset);
    } else {
      with_type(share.source->data, share.source->dtype,
                [&](auto* data) { copy_tile<T, n, kBounds, 2>(p, tile, share, data + share.offset); });
    }
  }
  // The marks are read; positions and columns take their places. A tile is looked up anew by every warp: the marks that
  // tell it must not go before all warps have done so.
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int64_t heads = int64_t(view.rows) * view.heads;
  for (int begin = 0; begin < block_tiles; begin += kThreads / 32) {
    Tile tile{};
    if (begin + warp < block_tiles) {
      tile = tile_at(view, first + begin + warp, head_tiles, tile_slots, tiles_per_page);
    }
    __syncthreads();
    int32_t* positions = view.positions + tile.item * view.capacity;  // [capacity]
    const int32_t* new_positions = p.new_positions + tile.item / view.heads * p.tokens;
    for (int slot = tile.begin + lane; slot < tile.end; slot += 32) {
      const int token = ~positions[slot];
      if (token < 0) continue;
      for (int c = 0; c < view.n_columns; ++c) {
        const int64_t line = c * heads + tile.item;
        view.columns[line * view.capacity + slot] = p.new_columns ? p.new_columns[line * p.tokens + token] : 0.0f;
      }
      positions[slot] = new_positions[token];
    }
  }
}

using One = void (*)(AppendParams, int);
using Many = void (*)(AppendParams, int, int, int, int);

// [dtype of the pages][with vectors]
const One kOne[3][2] = {{append_one<float, 1>, append_one<float, 4>},
                        {append_one<bf16, 1>, append_one<bf16, 8>},
                        {append_one<f16, 1>, append_one<f16, 8>}};
// [with bounds][in the pages' type already]
template <class T, int n>
struct ManyTokens {
  static constexpr Many kKernels[2][2] = {{append_many<T, n, false, false>, append_many<T, n, false, true>},
                                          {append_many<T, n, true, false>, append_many<T, n, true, true>}};
};
Many many_tokens(DType dtype, bool wide, bool bounds, bool same) {
  switch (dtype) {
    case DType::kFloat32:
      return (wide ? ManyTokens<float, 4>::kKernels : ManyTokens<float, 1>::kKernels)[bounds][same];
    case DType::kBFloat16:
      return (wide ? ManyTokens<bf16, 8>::kKernels : ManyTokens<bf16, 1>::kKernels)[bounds][same];
    default:
      return (wide ? ManyTokens<f16, 8>::kKernels : ManyTokens<f16, 1>::kKernels)[bounds][same];
  }
}

// Whether n elements of a given tensor can be loaded at once everywhere. Strides of dimensions of size 1 do not matter.
bool vectors_fit(const AppendParams& p, const Strided4& given, int n) {
  const int64_t size[3] = {p.view.rows, p.view.heads, p.tokens};
  const int bytes = element_bytes(given.dtype);
  int64_t all = address(given.data);
  for (int i = 0; i < 3; ++i) all |= size[i] > 1 ? given.stride[i] * bytes : 0;
  return common_unit(all) >= std::min(16, n * bytes);
}

}  // namespace

int append(const AppendParams& p, Stream stream) {
  const PagedView& view = p.view;
  const int64_t items = int64_t(view.rows) * view.heads;
  if (items == 0 || p.tokens == 0) return 0;
  const int bytes = element_bytes(view.dtype), vector = 16 / bytes;
  const bool wide = common_unit(address(view.k_pages), address(view.v_pages), address(p.bounds), view.k_dim * bytes,
                                view.v_dim * bytes) == 16 &&
                    vectors_fit(p, p.k, vector) && vectors_fit(p, p.v, vector);
  const int units = (view.k_dim + view.v_dim) / (wide ? vector : 1);
  const int together = std::max(1, kThreads / std::max(1, units));  // heads or tiles of a block
  if (p.tokens == 1) {
    const int64_t blocks = ceil_div(items, together);
    if (blocks > INT32_MAX) return kInvalidConfiguration;
    const One append_one_of_type = kOne[int(view.dtype)][wide];
    return KVCACHE_LAUNCH_DEPENDENT(append_one_of_type, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, p, together);
  }
  const int tile_slots = p.bounds ? view.page_size : std::min(kTileSlots, view.page_size);
  const int tiles_per_page = int(ceil_div(view.page_size, tile_slots));
  const int64_t pages = ceil_div(p.tokens - 1, view.page_size) + 1;
  // Every page that the tokens reach has at most one tile that is not full.
  const int64_t head_tiles = std::min(pages * tiles_per_page, ceil_div(p.tokens - 1, tile_slots) + 1 + pages);
  const int64_t blocks = ceil_div(items * head_tiles, together);
  if (head_tiles > INT32_MAX || blocks > INT32_MAX || items > INT32_MAX) return kInvalidConfiguration;
  constexpr int kHeadWarps = 16;
  const int error = p.tokens <= 32 * kNumberPerLane
                        ? KVCACHE_LAUNCH_DEPENDENT(number_tokens<1>, dim3(unsigned(ceil_div(items, kThreads / 32))),
                                                   dim3(kThreads), 0, stream, p)
                        : KVCACHE_LAUNCH_DEPENDENT(number_tokens<kHeadWarps>, dim3(unsigned(items)),
                                                   dim3(kHeadWarps * 32), kHeadWarps * sizeof(int), stream, p);
  if (error) return error;
  const Many append_many_of_type =
      many_tokens(view.dtype, wide, p.bounds != nullptr, p.k.dtype == view.dtype && p.v.dtype == view.dtype);
  return KVCACHE_LAUNCH_DEPENDENT(append_many_of_type, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, p,
                                  int(head_tiles), together, tile_slots, tiles_per_page);
}

}  // namespace kvcache::cuda
