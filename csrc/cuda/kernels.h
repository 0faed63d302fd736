// Entry points of the CUDA kernels: plain structs with device pointers, no torch, no CUDA headers. The same sources run on
// the host under csrc/emulation. Every function only launches (no synchronisation, no allocation: it can be captured in
// a graph) and returns a CUDA error code, 0 when fine: error_string() in runtime.h names it.
#pragma once
#include <cstdint>

#include "../core/params.h"

namespace kvcache::cuda {

using Stream = void*;  // a cudaStream_t

// Storage. append also counts; compact sets counts; overwrite and evict lower them.
int append(const AppendParams& p, Stream stream);
int copy_pages(const CopyPagesParams& p, Stream stream);
int compact(const CompactParams& p, Stream stream);
int overwrite(const OverwriteParams& p, Stream stream);
int page_bounds(const PageBoundsParams& p, Stream stream);

// Attention. Scratch sizes in bytes are functions of shapes alone, so that a captured graph stays valid.
int plan_decode(const PlanParams& p, Stream stream);
int64_t decode_attention_scratch(const AttentionParams& p, int multiprocessors);
int decode_attention(const AttentionParams& p, int multiprocessors, Stream stream);
int64_t latent_attention_scratch(const LatentParams& p, int multiprocessors);
int latent_attention(const LatentParams& p, int multiprocessors, Stream stream);
int64_t prefill_attention_scratch(const AttentionParams& p, int multiprocessors);
int prefill_attention(const AttentionParams& p, int multiprocessors, Stream stream);
int query_begin(const QueryBeginParams& p, Stream stream);
int64_t column_sums_scratch(const ColumnSumsParams& p, int multiprocessors);
// Writes every entry of sums, zeros where dead. Scratch: p.attention.scratch.
int column_sums(const ColumnSumsParams& p, int multiprocessors, Stream stream);

// Selection.
int64_t selection_scores_scratch(const SelectionParams& p);
int selection_scores(const SelectionParams& p, Stream stream);  // writes every score, -inf where no candidate
int64_t page_scores_scratch(const PageScoresParams& p);
int page_scores(const PageScoresParams& p, Stream stream);  // likewise
int64_t topk_scratch(const TopKParams& p);
int topk(const TopKParams& p, void* scratch, Stream stream);
int64_t choose_victims_scratch(const VictimParams& p);
int choose_victims(const VictimParams& p, void* scratch, Stream stream);
int64_t evict_scratch(const EvictParams& p);
int evict(const EvictParams& p, void* scratch, Stream stream);
int query_similarity(const SimilarityParams& p, Stream stream);
int64_t select_tokens_scratch(const SelectTokensParams& p);
int select_tokens(const SelectTokensParams& p, void* scratch, Stream stream);

// Routing of rows.
int active_rows(const ActiveRowsParams& p, Stream stream);
int gather_rows(const RowsParams& p, Stream stream);
int scatter_rows(const RowsParams& p, Stream stream);

}  // namespace kvcache::cuda
