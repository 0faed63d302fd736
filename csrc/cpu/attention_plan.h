// Sizes that the callers of the attention kernels and the kernels agree on: work items and scratch memory.
// `static`: an inline function would be a weak symbol, and the linker might keep the copy of the widest instruction set.
#pragma once
#include "kernels.h"

namespace kvcache::cpu {

// Entries that a head's list names at most: those of the pages if it lists pages.
[[maybe_unused]] static int64_t index_places(const AttentionParams& p) {
  return p.index_width * (p.index_pages ? int64_t(p.view.page_size) : 1);
}

// Floats of `scratch`: each split's partial result, then the logits when statistics are collected.
[[maybe_unused]] static int64_t decode_scratch_floats(const AttentionParams& p) {
  const int64_t queries = int64_t(p.view.rows) * p.query_heads;
  const int64_t partials = p.splits > 1 ? queries * p.splits * (p.view.v_dim + 3) : 0;
  const int64_t logits = p.statistics ? queries * (p.index ? index_places(p) : p.view.capacity) : 0;
  return partials + logits;
}

// Tokens of one prefill work item; a (row, head) has ceil(tokens / block) items.
[[maybe_unused]] static int32_t prefill_query_block(int32_t query_heads, int32_t heads) {
  const int32_t group = heads > 0 ? query_heads / heads : 1;
  return group >= 192 ? 1 : 192 / (group > 0 ? group : 1);
}

// Floats of latent attention's `scratch`: each split's partial result, then the logits when statistics are collected.
[[maybe_unused]] static int64_t latent_partial_floats(const LatentParams& p) {
  const AttentionParams& a = p.attention;
  const int64_t queries = int64_t(a.view.rows) * a.tokens * a.query_heads;
  return a.splits > 1 ? queries * a.splits * (a.view.k_dim + 2) : 0;
}
[[maybe_unused]] static int64_t latent_scratch_floats(const LatentParams& p) {
  const AttentionParams& a = p.attention;
  const int64_t logits = a.statistics ? int64_t(a.view.rows) * a.query_heads * a.view.capacity : 0;
  return latent_partial_floats(p) + logits;
}

// Selection scores: places of one work item of the logits and of the vote, and of a tile, which keeps a softmax of its own.
static constexpr int64_t kLogitPlaces = 4096, kVotePlaces = 8192, kPlaceTile = 128;
// Pieces of a line of `width` places.
[[maybe_unused]] static int64_t place_pieces(int64_t width, int64_t piece) { return (width + piece - 1) / piece; }
// Floats of `scratch` for one query head: [width] weights relative to their tile's peak, then [tiles] peaks and [tiles] masses.
[[maybe_unused]] static int64_t selection_line_floats(int64_t width) {
  return width + 2 * place_pieces(width, kPlaceTile);
}

// Slots of one column-sum work item; a (row, head) has ceil(capacity / block) items (those beyond its count are free).
static constexpr int64_t kColumnBlock = 96;
// The same of latent attention's statistics; a row has ceil(capacity / block) items.
static constexpr int64_t kLatentColumns = 512;

}  // namespace kvcache::cpu
