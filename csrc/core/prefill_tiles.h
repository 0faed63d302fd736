// How prefill attention and column sums on a GPU are cut into blocks. Pure functions of shapes, so that a captured graph
// stays valid whatever the entries' number is by then.
#pragma once
#include <algorithm>
#include <cstdint>

#include "params.h"

namespace kvcache {

enum class PrefillKernel : int32_t {
  kGeneral,  // no tensor cores: any storage, any head size
  kSmall,    // 16 query rows, warps share out the entries: a few queries, bound by memory
  kMiddle,   // 64 query rows, 16 per warp
  kLarge,    // 128 query rows, 32 per warp
};

// A "query row" is one query head of one token: the group of a kv head is packed beside its tokens, so that few tokens
// still fill a tile. Row m of a kv head is token m / group, query head m % group of the group.
struct PrefillTiles {
  PrefillKernel kernel;
  int32_t v_width;     // columns of values that the kernel has registers for: 64, 128 or 256
  int32_t rows, keys;  // query rows of a block, entries of a tile
  int32_t stages;      // tiles in shared memory
  int32_t shared_bytes;
  int32_t row_tiles;  // per kv head
  int32_t splits;     // pieces that the entries of a head are cut into, at most
  int32_t section;    // heads whose blocks are neighbours in the launch
};

constexpr int32_t kSharedLimit =
    99 * 1024;  // per block, of sm_86, 89 and 120; what newer ones have more holds a second block
constexpr int32_t kEntriesPerPiece = 256;  // a piece smaller than that costs more in the combine pass than it gains
constexpr int32_t kMostPieces = 64;
constexpr int32_t kPrefillFactsBytes = 256;  // of shared memory, for what a block knows of itself
constexpr int64_t kSectionBytes = 24 << 20;  // keys and values that blocks running at the same time find in the L2

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int32_t round_up_to(int32_t x, int32_t step) { return (x + step - 1) / step * step; }

// Head sizes that the tensor-core kernels know.
inline bool tensor_core_width(int32_t dim) {
  return dim == 64 || dim == 80 || dim == 96 || dim == 128 || dim == 192 || dim == 256;
}
inline bool aligned_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Rows of the storage are copied 16 bytes at a time.
inline bool uses_tensor_cores(const AttentionParams& p, bool values) {
  const PagedView& view = p.view;
  return view.dtype != DType::kFloat32 && p.q.dtype == view.dtype && tensor_core_width(view.k_dim) &&
         aligned_16(view.k_pages) && (!values || (tensor_core_width(view.v_dim) && aligned_16(view.v_pages)));
}

// Bytes of shared memory of a tensor-core kernel: queries, then keys and values per stage, in rows of whole 128 bytes (the
// swizzle permutes 16-byte chunks within those); behind them what is known of rows and entries.
inline int32_t prefill_shared_bytes(int32_t k_dim, int32_t v_dim, int32_t rows, int32_t keys, int32_t stages) {
  const int32_t k_width = round_up_to(k_dim, 64), v_width = round_up_to(v_dim, 64);
  return 2 * (rows * k_width + stages * keys * (k_width + v_width)) + kPrefillFactsBytes + rows * 8 +
         stages * (keys * 8 + 8) + 2 * 32 * 8;
}
// Of the kernel without tensor cores: queries, a tile that holds keys, then values, and weights, all as floats.
inline int32_t prefill_general_width(int32_t dim) { return round_up_to(dim, 4) + 4; }
inline int32_t prefill_general_bytes(int32_t k_dim, int32_t v_dim, int32_t rows, int32_t keys) {
  const int32_t k_width = prefill_general_width(k_dim), width = std::max(k_width, prefill_general_width(v_dim));
  return 4 * (rows * k_width + keys * width + keys * (rows + 4)) + kPrefillFactsBytes + rows * 8 + keys * 8 +
         2 * 32 * 8;
}

// Smallest number of pieces that fills the GPU about as well as any: at least 90 % of the best share of its places over all
// waves. Blocks that fill it anyway are left whole.
inline int32_t pieces_that_fill(int64_t blocks, int64_t places, int64_t most) {
  if (blocks <= 0 || blocks >= places || most <= 1) return 1;
  auto used = [&](int64_t splits) {
    const int64_t work = blocks * splits;
    return double(work) / double(ceil_divide(work, places) * places);
  };
  double best = 0;
  for (int64_t s = 1; s <= most; ++s) best = std::max(best, used(s));
  for (int64_t s = 1; s <= most; ++s) {
    if (used(s) >= 0.9 * best) return int32_t(s);
  }
  return 1;
}

inline PrefillTiles prefill_tiles(const AttentionParams& p, int32_t multiprocessors) {
  const PagedView& view = p.view;
  PrefillTiles tiles{};
  const int64_t items = int64_t(view.rows) * view.heads;
  const int64_t query_rows = items > 0 ? int64_t(p.tokens) * (p.query_heads / view.heads) : 0;
  const int64_t entries = p.index ? std::min<int64_t>(p.index_width, view.capacity) : view.capacity;
  int64_t places = multiprocessors;  // blocks at a time
  auto shared = [&](int32_t rows, int32_t keys, int32_t stages) {
    return prefill_shared_bytes(view.k_dim, view.v_dim, rows, keys, stages);
  };
  if (!uses_tensor_cores(p, true)) {
    tiles.kernel = PrefillKernel::kGeneral;
    tiles.rows = 32, tiles.keys = 32, tiles.stages = 1;
    tiles.shared_bytes = prefill_general_bytes(view.k_dim, view.v_dim, tiles.rows, tiles.keys);
    places *= 2;
  } else {
    const bool wide = view.v_dim > 128 || view.k_dim > 192;
    tiles.v_width = wide ? 256 : view.v_dim > 64 ? 128 : 64;
    tiles.keys = wide ? 32 : 64;
    if (query_rows <= 16) {
      tiles.kernel = PrefillKernel::kSmall, tiles.rows = 16;
      tiles.stages = shared(16, tiles.keys, 3) <= kSharedLimit * 3 / 4 ? 3 : 2;
      places *= 3;
    } else {
      const bool large = !wide && query_rows > 64 && items * ceil_divide(query_rows, 128) >= multiprocessors;
      tiles.kernel = large ? PrefillKernel::kLarge : PrefillKernel::kMiddle;
      tiles.rows = large ? 128 : 64;
      tiles.stages = shared(tiles.rows, tiles.keys, 2) <= kSharedLimit ? 2 : 1;
      places *= 2;
    }
    tiles.shared_bytes = shared(tiles.rows, tiles.keys, tiles.stages);
  }
  tiles.row_tiles = int32_t(ceil_divide(query_rows, tiles.rows));
  tiles.splits =
      pieces_that_fill(items * tiles.row_tiles, places, std::min<int64_t>(entries / kEntriesPerPiece, kMostPieces));
  const int64_t bytes =
      std::max<int64_t>(1, entries * (view.k_dim + view.v_dim) * (view.dtype == DType::kFloat32 ? 4 : 2));
  tiles.section = int32_t(std::max<int64_t>(1, std::min(items, kSectionBytes / bytes)));
  return tiles;
}

// Partial results, one per (kv head, piece, query row): sums over the values, then peak and mass.
inline int64_t prefill_scratch_floats(const AttentionParams& p, const PrefillTiles& tiles) {
  if (tiles.splits <= 1) return 0;
  return int64_t(tiles.splits) * p.view.rows * p.query_heads * p.tokens * (p.view.v_dim + 2);
}

// --- column sums ------------------------------------------------------------------------------------------------------

struct ColumnTiles {
  bool tensor_cores;
  int32_t entries, queries;  // of a block, and of the tiles in which it reads the tokens of one query head
  int32_t shared_bytes;
  int32_t entry_tiles;  // per kv head
  int32_t splits;       // pieces that the queries are cut into, at most
  int32_t section;      // heads whose blocks are neighbours in the launch
};

constexpr int32_t kColumnStages = 2;

inline ColumnTiles column_tiles(const ColumnSumsParams& sums, int32_t multiprocessors) {
  const AttentionParams& p = sums.attention;
  const PagedView& view = p.view;
  ColumnTiles tiles{};
  const int64_t items = int64_t(view.rows) * view.heads;
  int64_t together = reinterpret_cast<uintptr_t>(p.q.data);
  for (int64_t stride : p.q.stride) together |= stride * 2;
  tiles.tensor_cores = uses_tensor_cores(p, false) && together % 16 == 0;
  if (tiles.tensor_cores) {
    const int32_t width = round_up_to(view.k_dim, 64);
    tiles.entries = view.k_dim > 128 ? 64 : 128;
    tiles.queries = 64;
    tiles.shared_bytes = 2 * width * (tiles.entries + kColumnStages * tiles.queries) + kPrefillFactsBytes +
                         tiles.entries * 4 + kColumnStages * (tiles.queries * 12 + 16) + 2 * 32 * 16;
  } else {
    tiles.entries = tiles.queries = 32;
    tiles.shared_bytes =
        4 * prefill_general_width(view.k_dim) * 64 + kPrefillFactsBytes + 32 * 4 + 32 * 12 + 16 + 2 * 32 * 16;
  }
  const int64_t query_tiles = ceil_divide(p.tokens, tiles.queries);
  tiles.entry_tiles = int32_t(ceil_divide(view.capacity, tiles.entries));
  tiles.splits =
      pieces_that_fill(items * tiles.entry_tiles, 2 * multiprocessors, std::min<int64_t>(query_tiles, kMostPieces));
  const int64_t group = items > 0 ? p.query_heads / view.heads : 1;
  const int64_t bytes = std::max<int64_t>(1, group * p.tokens * view.k_dim * (p.q.dtype == DType::kFloat32 ? 4 : 2));
  tiles.section = int32_t(std::max<int64_t>(1, std::min(items, kSectionBytes / bytes)));
  return tiles;
}

// One partial sum per piece and entry.
inline int64_t column_scratch_floats(const ColumnSumsParams& sums, const ColumnTiles& tiles) {
  const PagedView& view = sums.attention.view;
  return tiles.splits <= 1 ? 0 : int64_t(tiles.splits) * view.rows * view.heads * view.capacity;
}

}  // namespace kvcache
