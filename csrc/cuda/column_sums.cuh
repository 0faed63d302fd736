// What the kernels of column sums share: which block does what, which queries it reads, and where the sums go.
#pragma once
#include "../core/prefill_tiles.h"
#include "kernels.h"
#include "prefill_entries.cuh"

namespace kvcache::cuda {

// Launches of the kernels in column_sums_*.cu.
int column_sums_mma(const ColumnSumsParams& sums, const ColumnTiles& tiles, Stream stream);
int column_sums_general(const ColumnSumsParams& sums, const ColumnTiles& tiles, Stream stream);

inline int64_t column_blocks(const ColumnSumsParams& sums, const ColumnTiles& tiles) {
  return int64_t(sums.attention.view.rows) * sums.attention.view.heads * tiles.entry_tiles * tiles.splits;
}

// Tiles of tokens from the first that counts on, and the pieces that they are cut into on the device.
struct QueryRange {
  int begin;              // first token that counts
  int first_tile, tiles;  // of all tokens
  int pieces;
};
__device__ __forceinline__ QueryRange query_range(const ColumnSumsParams& sums, const ColumnTiles& tiles, int row) {
  QueryRange range;
  range.begin = sums.query_begin ? sums.query_begin[row] : 0;
  range.first_tile = range.begin / tiles.queries;
  range.tiles = (sums.attention.tokens + tiles.queries - 1) / tiles.queries;
  range.pieces = max(1, min(tiles.splits, range.tiles - range.first_tile));
  return range;
}

struct ColumnBlock {
  int64_t item;  // row * heads + head
  int row, head, group;
  int first, entries;  // slots; entries <= 0: nothing alive
  int piece;
};

// The first tiles of entries come first, as most queries see them; sections as in prefill_block().
__device__ __forceinline__ ColumnBlock column_block(const ColumnSumsParams& sums, const ColumnTiles& tiles) {
  const AttentionParams& p = sums.attention;
  const int64_t items = int64_t(p.view.rows) * p.view.heads, per_item = int64_t(tiles.entry_tiles) * tiles.splits;
  const int64_t section = blockIdx.x / (tiles.section * per_item), first_item = section * tiles.section;
  const int64_t in_section = items - first_item < tiles.section ? items - first_item : tiles.section;
  const int64_t place = blockIdx.x - first_item * per_item;
  ColumnBlock block;
  block.item = first_item + place % in_section;
  const int rest = int(place / in_section);  // tile and piece
  block.piece = rest % tiles.splits;
  block.row = int(block.item / p.view.heads);
  block.head = int(block.item % p.view.heads);
  block.group = p.query_heads / p.view.heads;
  block.first = rest / tiles.splits * tiles.entries;
  block.entries = min(tiles.entries, p.view.counts[block.item] - block.first);
  return block;
}

// The sums' memory for a block's entries: the result itself, or one piece of it.
__device__ __forceinline__ float* sums_of(const ColumnSumsParams& sums, const ColumnTiles& tiles,
                                          const ColumnBlock& block) {
  const PagedView& view = sums.attention.view;
  const int64_t place = block.item * view.capacity + block.first;
  if (tiles.splits == 1) return sums.sums + place;
  return sums.attention.scratch + block.piece * (int64_t(view.rows) * view.heads * view.capacity) + place;
}

// One query of one head: what it sees and its log-sum-exp in base 2, infinite where it has no weight to give: then all of
// exp2(logit - level) is 0.
struct ColumnQuery {
  int last, start;
  float level;
};
__device__ __forceinline__ bool counts(const AttentionParams& p, const QueryRange& range, int row, int token) {
  return token >= range.begin && token < p.tokens &&
         (!p.q_positions || p.q_positions[int64_t(row) * p.tokens + token] >= 0);
}
__device__ __forceinline__ ColumnQuery column_query(const ColumnSumsParams& sums, const QueryRange& range, int row,
                                                    int query_head, int token) {
  const AttentionParams& p = sums.attention;
  ColumnQuery query{-1, INT32_MIN, kInfinity};
  if (!counts(p, range, row, token)) return query;
  const int64_t place = int64_t(row) * p.tokens + token;
  query.last = min(p.q_positions ? p.q_positions[place] : INT32_MAX, kNowhere - 1);
  if (p.window_start) query.start = p.window_start[place];
  const float lse = sums.lse[(int64_t(row) * p.query_heads + query_head) * p.tokens + token];
  if (lse != -kInfinity) query.level = lse * kLog2E;
  return query;
}

// Finds the tiles of kQueries tokens of which one sees some of the block's entries. Looks at kChunk tiles at a time.
template <int kQueries, int kThreads>
struct QueryScan {
  static constexpr int kChunk = 32, kLanes = 4;
  Reach* reach;   // shared, [2][kChunk]
  int end, next;  // tiles; the first that was not looked at
  int chunk = 0, parity = 1;
  unsigned left = 0;

  __device__ QueryScan(Reach* memory, int first_tile, int end_tile) : reach(memory), end(end_tile), next(first_tile) {}

  // The next tile, -1 when none is left. All threads of the block call it together and get the same.
  __device__ int pull(const AttentionParams& p, const QueryRange& range, int row, const Bounds& entries) {
    while (left == 0) {
      if (next >= end) return -1;
      look(p, range, row, entries);
    }
    const int t = __ffs(int(left)) - 1;
    left &= left - 1;
    return chunk + t;
  }
  __device__ Reach of(int tile) const { return reach[parity * kChunk + tile - chunk]; }

 private:
  __device__ void look(const AttentionParams& p, const QueryRange& range, int row, const Bounds& entries) {
    chunk = next;
    next += kChunk;
    parity ^= 1;
    const int lane = threadIdx.x % 32;
    for (int t = threadIdx.x / kLanes; t < kChunk; t += kThreads / kLanes) {
      Reach r{INT32_MAX, -1, INT32_MAX, INT32_MIN};
      if (chunk + t < end) {
#pragma unroll 4
        for (int j = 0; j < kQueries / kLanes; ++j) {
          const int token = (chunk + t) * kQueries + j * kLanes + lane % kLanes;
          if (!counts(p, range, row, token)) continue;
          const int64_t place = int64_t(row) * p.tokens + token;
          const int last = min(p.q_positions ? p.q_positions[place] : INT32_MAX, kNowhere - 1);
          const int start = p.window_start ? p.window_start[place] : INT32_MIN;
          r.low_last = min(r.low_last, last), r.high_last = max(r.high_last, last);
          r.low_start = min(r.low_start, start), r.high_start = max(r.high_start, start);
        }
      }
#pragma unroll
      for (int distance = 1; distance < kLanes; distance *= 2) {
        r.low_last = min(r.low_last, __shfl_xor_sync(kFullWarp, r.low_last, distance));
        r.high_last = max(r.high_last, __shfl_xor_sync(kFullWarp, r.high_last, distance));
        r.low_start = min(r.low_start, __shfl_xor_sync(kFullWarp, r.low_start, distance));
        r.high_start = max(r.high_start, __shfl_xor_sync(kFullWarp, r.high_start, distance));
      }
      if (lane % kLanes == 0) reach[parity * kChunk + t] = r;
    }
    __syncthreads();
    left = __ballot_sync(kFullWarp, chunk + lane < end && !reach[parity * kChunk + lane].hides(entries));
  }
};

}  // namespace kvcache::cuda
