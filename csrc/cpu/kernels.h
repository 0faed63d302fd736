// CPU kernels of every op: no torch, no OpenMP. Each works on a range of items so that the caller brings the threads.
// Arguments are validated by the caller (bindings/torch_ops.cpp); semantics: python/kvcache/ops/reference.py.
#pragma once
#include <cstdint>

#include "../core/paged_view.h"

namespace kvcache::cpu {

struct AppendParams {
  PagedView view;
  Strided4 k, v;                 // [rows, heads, tokens, dim]
  const int32_t* new_positions;  // [rows, tokens]; -1: not stored
  const float* new_columns;      // [n_columns, rows, heads, tokens] or null (zeros)
  int32_t tokens;
};

struct CopyPagesParams {
  PagedView view;                  // only the page arrays
  const int32_t *source, *target;  // [n]
  int64_t n;
};

struct CompactParams {
  PagedView view;               // view.table is the source table
  const int32_t* target_table;  // [rows, heads, target_width]
  int32_t target_width;
  const int32_t* keep;         // [rows, heads, keep_width] ascending slots
  const int32_t* keep_counts;  // [rows, heads]
  int64_t keep_width;
};

struct OverwriteParams {
  PagedView view;
  const int32_t* victims;  // [rows, heads]; -1: none
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
  int32_t query_heads, tokens;
  float scale, softcap;  // softcap 0: none
  void* out;             // [rows, tokens, query_heads, v_dim] in q's dtype
  float* lse;            // [rows, query_heads, tokens]
  float* statistics;     // decode: [rows, heads, capacity] or null
  float statistics_decay;
  bool statistics_max;
  float* scratch;  // decode: see attention_plan.h: decode_scratch_floats
  int32_t splits;  // decode: pieces that a head's entries are cut into (core/split.h)
};

struct ColumnSumsParams {
  AttentionParams attention;   // out, statistics, sinks, index unused; lse is an input
  const float* lse;            // [rows, query_heads, tokens]
  const int32_t* query_begin;  // [rows] first query that counts (the `last` ones), 0 for all
  float* sums;                 // [rows, heads, capacity], zeroed by the caller
  bool reduce_max;
};

struct SelectionParams {
  PagedView view;
  Strided4 q;                  // [rows, query_heads, 1, k_dim]
  const int32_t *first, *end;  // [rows] candidate positions
  int32_t query_heads;
  float scale;
  bool soft, per_head;
  float* scores;   // [rows, per_head ? heads : 1, capacity], filled with -inf by the caller
  float* scratch;  // [rows, query_heads, capacity] logits
};

// The inputs may have any strides (in elements, of rows and heads), so that one head's lists can stand for all.
struct TopKParams {
  const float* scores;         // [rows, heads, capacity]
  const int32_t *counts, *k;   // [rows, heads]
  const int32_t* positions;    // [rows, heads, capacity]
  const int32_t *first, *end;  // [rows]
  int64_t scores_stride[2], positions_stride[2], counts_stride[2], k_stride[2];
  int32_t rows, heads;
  int64_t width;
  int32_t* index;         // [rows, heads, width]
  int32_t* index_counts;  // [rows, heads]; a head that needs more than width reports the number it needs
};

struct VictimParams {
  const float* scores;              // [rows, heads, capacity] or null: oldest candidate
  const int32_t *counts, *budgets;  // [rows, heads]
  const int32_t* positions;         // [rows, heads, capacity]
  const int32_t *first, *end;       // [rows]
  int64_t scores_stride[2], positions_stride[2], counts_stride[2], budgets_stride[2];
  int32_t rows, heads;
  int32_t* victims;  // [rows, heads]
};

// clang-format off: lined up by hand
// One table per instruction set. `begin`, `end` are a range of work items; the unit is given per entry.
struct Table {
  const char* isa;
  void (*append)(const AppendParams&, int64_t begin, int64_t end);                 // row * heads + head; leaves counts alone
  void (*copy_pages)(const CopyPagesParams&, int64_t begin, int64_t end);          // pages
  void (*compact)(const CompactParams&, int64_t begin, int64_t end);               // row * heads + head
  void (*overwrite)(const OverwriteParams&, int64_t begin, int64_t end);           // row * heads + head
  void (*decode_attention)(const AttentionParams&, int64_t begin, int64_t end);    // (row * heads + head) * splits + split
  void (*decode_combine)(const AttentionParams&, int64_t begin, int64_t end);      // row * heads + head; only when splits > 1 or statistics
  void (*prefill_attention)(const AttentionParams&, int64_t begin, int64_t end);  // (row * heads + head) * query blocks + block; see attention_plan.h
  void (*column_sums)(const ColumnSumsParams&, int64_t begin, int64_t end);        // (row * heads + head) * column blocks + block; see attention_plan.h
  void (*selection_logits)(const SelectionParams&, int64_t begin, int64_t end);    // row * heads + head; also the softmax of soft
  void (*selection_vote)(const SelectionParams&, int64_t begin, int64_t end);      // per_head ? row * heads + head : row; after all selection_logits
  void (*topk)(const TopKParams&, int64_t begin, int64_t end);                     // row * heads + head
  void (*choose_victims)(const VictimParams&, int64_t begin, int64_t end);         // row * heads + head
  // Limits of this machine, for bench/: _C.probe_read(address, bytes) -> checksum, _C.probe_fma(iterations) -> flops done.
  double (*probe_read)(const void* data, int64_t bytes);  // streams through `bytes` (a multiple of 4096)
  int64_t (*probe_fma)(int64_t iterations);
};
// clang-format on

// Chosen once at first use; KVCACHE_ISA=base | x86-64-v3 | x86-64-v4 forces a lower one. Throws when that is impossible.
const Table& table();
int available_isas(const char** names, int capacity);  // names of the sets that this CPU runs, lowest first

}  // namespace kvcache::cpu
