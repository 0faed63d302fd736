// What the kernels of prefill attention share: which block does what, and how a query row ends.
#pragma once
#include "../core/prefill_tiles.h"
#include "kernels.h"
#include "prefill_entries.cuh"

namespace kvcache::cuda {

// Launches of the kernels in prefill_attention_*.cu.
int prefill_attention_combine(const AttentionParams& p, const PrefillTiles& tiles, Stream stream);
int prefill_attention_bf16(const AttentionParams& p, const PrefillTiles& tiles, Stream stream);
int prefill_attention_f16(const AttentionParams& p, const PrefillTiles& tiles, Stream stream);
int prefill_attention_general(const AttentionParams& p, const PrefillTiles& tiles, Stream stream);

inline int64_t prefill_blocks(const AttentionParams& p, const PrefillTiles& tiles) {
  return int64_t(p.view.rows) * p.view.heads * tiles.row_tiles * tiles.splits;
}

// Pieces that a head's entries are really cut into: known on the device only, the launch provides for tiles.splits.
__device__ __forceinline__ int prefill_pieces(const PrefillTiles& tiles, int places) {
  return max(1, min(tiles.splits, places / kEntriesPerPiece));
}

struct PrefillBlock {
  int64_t item;  // row * heads + head
  int row, head, group;
  int first, rows;  // query rows of this block
  int piece;
};

// Blocks of a section of heads are neighbours, so that the section's keys and values stay in the L2; within it the last
// tiles of queries come first, as they usually see the most.
__device__ __forceinline__ PrefillBlock prefill_block(const AttentionParams& p, const PrefillTiles& tiles) {
  const int heads = p.view.heads;
  const int64_t items = int64_t(p.view.rows) * heads, per_item = int64_t(tiles.row_tiles) * tiles.splits;
  const int64_t section = blockIdx.x / (tiles.section * per_item), first_item = section * tiles.section;
  const int64_t in_section = items - first_item < tiles.section ? items - first_item : tiles.section;
  const int64_t place = blockIdx.x - first_item * per_item;
  PrefillBlock block;
  block.item = first_item + place % in_section;
  const int rest = int(place / in_section);  // tile and piece
  block.piece = rest % tiles.splits;
  block.row = int(block.item / heads);
  block.head = int(block.item % heads);
  block.group = p.query_heads / heads;
  block.first = (tiles.row_tiles - 1 - rest / tiles.splits) * tiles.rows;
  block.rows = min(tiles.rows, p.tokens * block.group - block.first);
  return block;
}

// Positions that the block's query rows see, into shared last[tiles.rows] and start[tiles.rows].
__device__ __forceinline__ void load_limits(const AttentionParams& p, const PrefillBlock& block, int rows,
                                            int32_t* last, int32_t* start) {
  for (int m = threadIdx.x; m < rows; m += blockDim.x) {
    last[m] = -1;
    start[m] = INT32_MIN;
    if (m < block.rows) {
      const int64_t place = int64_t(block.row) * p.tokens + (block.first + m) / block.group;
      last[m] = min(p.q_positions ? p.q_positions[place] : INT32_MAX, kNowhere - 1);
      if (p.window_start) start[m] = p.window_start[place];
    }
  }
}

// Of query row m of the block.
__device__ __forceinline__ int64_t query_offset(const AttentionParams& p, const PrefillBlock& block, int m) {
  const int token = (block.first + m) / block.group, g = (block.first + m) % block.group;
  return block.row * p.q.stride[0] + (int64_t(block.head) * block.group + g) * p.q.stride[1] + token * p.q.stride[2];
}

// How the sums of a query row become its output: factor, and the row's log-sum-exp. peak and mass are in base 2, peak is
// -inf when the row has read nothing.
struct RowEnd {
  float factor, lse;
};
__device__ __forceinline__ RowEnd end_row(const AttentionParams& p, int query_head, bool real, float peak, float mass) {
  if (!real || peak == -kInfinity) return {0.0f, -kInfinity};
  float level = fmaxf(peak, kFloor), shrink = 1.0f;
  if (p.sinks) {
    const float sink = p.sinks[query_head] * kLog2E;
    const float top = fmaxf(mass > 0 ? level : kFloor, sink);
    shrink = exp2f(level - top);
    mass = mass * shrink + exp2f(sink - top);
    level = top;
  }
  if (mass == 0) return {0.0f, -kInfinity};
  return {shrink / mass, (level + log2f(mass)) * kLn2};
}

// Where a query row's partial result lies; peaks and masses follow all sums.
struct Partial {
  float *sums, *peak, *mass;
};
__device__ __forceinline__ Partial partial_of(const AttentionParams& p, const PrefillTiles& tiles, int64_t item,
                                              int piece, int row) {
  const int64_t query_rows = int64_t(p.tokens) * (p.query_heads / p.view.heads);
  const int64_t all = int64_t(p.view.rows) * p.view.heads * tiles.splits * query_rows;
  const int64_t place = (item * tiles.splits + piece) * query_rows + row;
  float* ends = p.scratch + all * p.view.v_dim;
  return {p.scratch + place * p.view.v_dim, ends + place, ends + all + place};
}

}  // namespace kvcache::cuda
