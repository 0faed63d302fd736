// CPU kernels of every op: no torch, no OpenMP. Each works on a range of items so that the caller brings the threads.
// Arguments are validated by the caller (bindings/torch_ops.cpp); semantics: python/kvcache/ops/reference.py.
#pragma once
#include <cstdint>

#include "../core/params.h"

namespace kvcache::cpu {

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
  void (*latent_attention)(const LatentParams&, int64_t begin, int64_t end);       // (row * query blocks + block) * splits + split
  void (*latent_combine)(const LatentParams&, int64_t begin, int64_t end);         // (row * tokens + token) * query_heads + query head; only when splits > 1
  void (*latent_statistics)(const LatentParams&, int64_t begin, int64_t end);      // row * column blocks + block; after the others
  void (*column_sums)(const ColumnSumsParams&, int64_t begin, int64_t end);        // (row * heads + head) * column blocks + block; see attention_plan.h
  void (*selection_logits)(const SelectionParams&, int64_t begin, int64_t end);    // (row * heads + head) * logit pieces + piece; see attention_plan.h
  void (*selection_vote)(const SelectionParams&, int64_t begin, int64_t end);      // (per_head ? row * heads + head : row) * vote pieces + piece; after all selection_logits
  void (*topk)(const TopKParams&, int64_t begin, int64_t end);                     // row * heads + head
  void (*choose_victims)(const VictimParams&, int64_t begin, int64_t end);         // row * heads + head
  void (*page_bounds)(const PageBoundsParams&, int64_t begin, int64_t end);        // row * heads + head
  void (*page_logits)(const PageScoresParams&, int64_t begin, int64_t end);        // as selection_logits
  void (*page_vote)(const PageScoresParams&, int64_t begin, int64_t end);          // as selection_vote
  void (*query_similarity)(const SimilarityParams&, int64_t begin, int64_t end);   // row
  void (*select_begin)(const SelectTokensParams&, int64_t begin, int64_t end);     // row; `active` rows are left to selection_*, page_* and topk
  void (*active_rows)(const ActiveRowsParams&);
  void (*gather_rows)(const RowsParams&, int64_t begin, int64_t end);              // row of `picked`
  void (*scatter_rows)(const RowsParams&, int64_t begin, int64_t end);             // row of `picked`
  // Limits of this machine, for bench/: _C.probe_read(address, bytes) -> checksum, _C.probe_fma(iterations) -> flops done.
  double (*probe_read)(const void* data, int64_t bytes);  // streams through `bytes` (a multiple of 4096)
  int64_t (*probe_fma)(int64_t iterations);
};
// clang-format on

// Chosen once at first use; KVCACHE_ISA=base | x86-64-v3 | x86-64-v4 forces a lower one. Throws when that is impossible.
const Table& table();
int available_isas(const char** names, int capacity);  // names of the sets that this CPU runs, lowest first

}  // namespace kvcache::cpu
