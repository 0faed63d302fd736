// Arguments of every op: plain pointers and sizes, the same for the CPU and the CUDA kernels.
//
// The CPU bindings have looked at the contents (counts, slots, page ids); on a GPU nobody has, as that would be a round
// trip to the host: the caller keeps them right. Semantics: python/kvcache/ops/reference.py.
#pragma once
#include <cstdint>

#include "paged_view.h"

namespace kvcache {

struct AppendParams {
  PagedView view;
  Strided4 k, v;                 // [rows, heads, tokens, dim]
  const int32_t* new_positions;  // [rows, tokens]; -1: not stored
  const float* new_columns;      // [n_columns, rows, heads, tokens] or null (zeros)
  int32_t tokens;
  void* bounds;  // [pages, 2, k_dim] in the pages' dtype or null: smallest and largest key of each page, per channel
};

struct CopyPagesParams {
  PagedView view;                  // only the page arrays
  const int32_t *source, *target;  // [n]
  int64_t n;
  void* bounds;  // as AppendParams::bounds, or null
};

// Bounds of the pages that hold the entries, from the keys: after a bulk change that append did not see.
struct PageBoundsParams {
  PagedView view;
  void* bounds;  // [pages, 2, k_dim]
};

struct CompactParams {
  PagedView view;               // view.table is the source table
  const int32_t* target_table;  // [rows, heads, target_width]
  int32_t target_width;
  const int32_t* keep;         // [rows, heads, keep_width] ascending slots
  const int32_t* keep_counts;  // [rows, heads]
  int64_t keep_width;
  void* bounds;  // as AppendParams::bounds, or null
};

struct OverwriteParams {
  PagedView view;
  const int32_t* victims;  // [rows, heads]; -1: none
  void* bounds;            // as AppendParams::bounds, or null
};

// What decode, prefill and column sums share about the reading side.
struct AttentionParams {
  PagedView view;
  Strided4 q;                   // [rows, query_heads, tokens, k_dim]; decode: tokens == 1
  const int32_t* q_positions;   // [rows, tokens]; null: everything is in the past (decode)
  const int32_t* window_start;  // [rows, tokens] or null: entries below are hidden
  const float* sinks;           // [query_heads] or null
  const float* bias;            // [rows, bias_heads, capacity] or null
  const bool* mask;             // [rows, mask_heads, tokens, capacity] or null; false hides
  const int32_t* index;         // [rows, index_heads, index_width] slots or null
  const int32_t* index_counts;  // [rows, index_heads]
  int32_t bias_heads, mask_heads, index_heads;
  int64_t index_width;
  bool index_pages;  // decode: index lists columns of the table, every entry of those pages is read
  int32_t query_heads, tokens;
  float scale, softcap;  // softcap 0: none
  void* out;             // [rows, tokens, query_heads, v_dim] in q's dtype
  float* lse;            // [rows, query_heads, tokens]
  float* statistics;     // decode: [rows, heads, capacity] or null
  float statistics_decay;
  bool statistics_max;
  float* scratch;        // CPU, decode: see attention_plan.h: decode_scratch_floats; GPU: *_scratch() in cuda/kernels.h
  int32_t splits;        // decode on the CPU: pieces that a head's entries are cut into (core/split.h)
  const int32_t* plan;   // decode on a GPU: this layer's part of a plan (core/decode_plan.h), or null
  int32_t plan_workers;  // that it is made for: decode_plan_workers(its size)
};

// Absorbed latent attention: an entry's key is its latent (k_pages) followed by its rotary key (v_pages), its value the
// latent alone. One kv head. In `attention` q is the latent part of the queries; view.k_dim and view.v_dim are the widths of
// latent and rotary key; out is [rows, tokens, query_heads, k_dim], lse [rows, tokens, query_heads].
struct LatentParams {
  AttentionParams attention;  // sinks, bias, mask, index unused; statistics: tokens == 1
  Strided4 q_rope;            // [rows, query_heads, tokens, v_dim] in q's dtype
};

// Shares out the entries of all heads among the blocks of a decode launch, for all layers at once.
struct PlanParams {
  const int32_t* counts;  // [layers, rows, heads]
  int32_t layers, rows, heads;
  int32_t added;    // entries that every head gains before the plan is used
  int64_t most;     // entries that no head exceeds then; fixes the sizes of a captured graph
  int32_t workers;  // blocks of a decode launch
  int32_t* plan;    // [layers, decode_plan_size(...)]
};

struct ColumnSumsParams {
  AttentionParams attention;   // out, statistics, sinks, index unused; lse is an input
  const float* lse;            // [rows, query_heads, tokens]
  const int32_t* query_begin;  // [rows] first query that counts (the `last` ones), 0 for all
  float* sums;                 // [rows, heads, capacity], zeroed by the caller
  bool reduce_max;
};

// For each row the first of its `last` real queries (position >= 0); the first of all when last is 0 or more than there
// are.
struct QueryBeginParams {
  const int32_t* q_positions;  // [rows, tokens]
  int32_t rows, tokens, last;
  int32_t* query_begin;  // [rows]
};

struct SelectionParams {
  PagedView view;
  Strided4 q;                  // [rows, query_heads, 1, k_dim]
  const int32_t *first, *end;  // [rows] candidate positions
  int32_t query_heads;
  float scale;
  bool soft, per_head;
  // Second stage: only the entries of these pages (columns of the table) are candidates. page_counts null: all entries;
  // an empty list may be null as well.
  const int32_t* pages;        // [rows, per_head ? heads : 1, page_width] ascending
  const int32_t* page_counts;  // [rows, per_head ? heads : 1]
  int64_t page_width;
  // [rows, per_head ? heads : 1, width], width = page_counts ? page_width * page_size : capacity. On the CPU filled with -inf
  // by the caller.
  float* scores;
  float* scratch;         // CPU: see attention_plan.h: selection_line_floats; GPU: see cuda/kernels.h
  const int32_t* active;  // GPU: [rows] or null; rows of 0 are left alone
};

// First stage: an upper bound of the logits of every page, from the bounds of its keys (Quest).
struct PageScoresParams {
  PagedView view;              // page arrays unused
  const void* bounds;          // [pages, 2, k_dim] in view.dtype
  Strided4 q;                  // [rows, query_heads, 1, k_dim]
  const int32_t *first, *end;  // [rows] candidate positions
  int32_t query_heads;
  float scale;
  bool soft, per_head;
  float* scores;          // [rows, per_head ? heads : 1, table_width]
  float* scratch;         // CPU: as SelectionParams::scratch; GPU: see cuda/kernels.h
  const int32_t* active;  // GPU: [rows] or null; rows of 0 are left alone
};

struct SimilarityParams {
  Strided4 a, b;  // [rows, query_heads, 1, dim]
  int32_t rows, query_heads, dim;
  float* out;  // [rows]
};

// Rows of a matrix, picked or put back by number: the tokens that a layer really computes.
struct RowsParams {
  void* x;               // [n, dim]
  void* picked;          // [count, dim]
  const int32_t* index;  // [count]; -1: a row of zeros, or nothing to put back
  int64_t n, count;
  int64_t row_bytes;
};

struct ActiveRowsParams {
  const bool* mask;  // [n]
  int64_t n;
  int32_t* index;  // [n]: the numbers of the true ones, ascending, then -1
  int32_t* count;  // [1]
};

// The inputs may have any strides (in elements, of rows and heads), so that one head's lists can stand for all.
struct TopKParams {
  const float* scores;         // [rows, heads, capacity], or [rows, heads, page_width * page_size]
  const int32_t *counts, *k;   // [rows, heads]
  const int32_t* positions;    // [rows, heads, capacity]
  const int32_t *first, *end;  // [rows]
  int64_t scores_stride[2], positions_stride[2], counts_stride[2], k_stride[2];
  int32_t rows, heads;
  int64_t capacity;
  // Where the scores are those of listed pages: score i belongs to slot pages[i / page_size] * page_size + i % page_size.
  const int32_t *pages, *page_counts;  // [rows, heads, page_width], [rows, heads]; page_size 0: score i is slot i's
  int64_t pages_stride[2], page_counts_stride[2], page_width;
  int32_t page_size;
  int64_t width;
  int32_t* index;         // [rows, heads, width]
  int32_t* index_counts;  // [rows, heads]; a head that needs more than width reports the number it needs
  const int32_t* active;  // GPU: [rows] or null; rows of 0 are left alone
};

// A decode step of TokenSelect: rows whose query is no longer like the one that made their list choose anew, the others go
// on with it (core/selection_cache.h).
struct SelectTokensParams {
  PagedView view;              // all heads of a row hold the same entries
  Strided4 q;                  // [rows, query_heads, 1, k_dim]
  const int32_t* q_positions;  // [rows]; -1: no query
  const float *cos, *sin;  // [rows, half]: what takes the rotation off the first 2 * half channels; null: nothing to do
  const void* bounds;      // [pages, 2, k_dim] in the pages' dtype or null: select from all pages
  void* query;             // [rows, query_heads, k_dim] in q's dtype: those that made the lists, without rotation
  int32_t* index;          // [rows, width] slots
  int32_t *index_counts, *until, *at;  // [rows]; see SelectionRow
  int32_t* events;                     // [2] selections, reuses
  int64_t width, shortlist;            // shortlist: pages that may be looked at, with bounds
  int32_t query_heads, half, sinks, k, local;
  float reuse, scale;
  bool soft;
  // What the first pass leaves to the others: on the CPU from the caller, on a GPU within the scratch memory.
  void* plain;           // CPU: [rows, query_heads, k_dim] q without its rotation, in its dtype; null where cos is null
  int32_t* active;       // [rows] 1: chooses anew
  int32_t *first, *end;  // [rows] the candidates' positions
};

struct VictimParams {
  const float* scores;              // [rows, heads, capacity] or null: oldest candidate
  const int32_t *counts, *budgets;  // [rows, heads]
  const int32_t* positions;         // [rows, heads, capacity]
  const int32_t *first, *end;       // [rows]
  int64_t scores_stride[2], positions_stride[2], counts_stride[2], budgets_stride[2];
  int32_t rows, heads;
  int64_t capacity;
  int32_t* victims;  // [rows, heads]
};

// choose_victims and then overwrite, of several layers that share their pages, rows and number of columns.
struct EvictParams {
  const VictimParams* choice;   // [layers]; victims only on the CPU
  const OverwriteParams* move;  // [layers], of the same tensors
  int32_t layers;
};

}  // namespace kvcache
