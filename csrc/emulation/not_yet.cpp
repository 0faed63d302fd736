// Kernels that other branches still write: calls of them return cudaErrorNotSupported until the real ones are linked,
// which win over these weak ones. To be deleted when all are there.
#include "../cuda/kernels.h"

namespace kvcache::cuda {
#define KVCACHE_NOT_YET(name, ...) \
  __attribute__((weak)) int name(__VA_ARGS__) { return 801; }
#define KVCACHE_NO_SCRATCH(name, ...) \
  __attribute__((weak)) int64_t name(__VA_ARGS__) { return 0; }
KVCACHE_NOT_YET(append, const AppendParams&, Stream)
KVCACHE_NOT_YET(copy_pages, const CopyPagesParams&, Stream)
KVCACHE_NOT_YET(compact, const CompactParams&, Stream)
KVCACHE_NOT_YET(overwrite, const OverwriteParams&, Stream)
KVCACHE_NOT_YET(page_bounds, const PageBoundsParams&, Stream)
KVCACHE_NOT_YET(plan_decode, const PlanParams&, Stream)
KVCACHE_NO_SCRATCH(decode_attention_scratch, const AttentionParams&, int)
KVCACHE_NOT_YET(decode_attention, const AttentionParams&, int, Stream)
KVCACHE_NO_SCRATCH(prefill_attention_scratch, const AttentionParams&, int)
KVCACHE_NOT_YET(prefill_attention, const AttentionParams&, int, Stream)
KVCACHE_NO_SCRATCH(column_sums_scratch, const ColumnSumsParams&, int)
KVCACHE_NOT_YET(column_sums, const ColumnSumsParams&, int, Stream)
KVCACHE_NO_SCRATCH(selection_scores_scratch, const SelectionParams&)
KVCACHE_NOT_YET(selection_scores, const SelectionParams&, Stream)
KVCACHE_NOT_YET(page_scores, const PageScoresParams&, Stream)
KVCACHE_NO_SCRATCH(topk_scratch, const TopKParams&)
KVCACHE_NOT_YET(topk, const TopKParams&, void*, Stream)
KVCACHE_NOT_YET(choose_victims, const VictimParams&, Stream)
KVCACHE_NOT_YET(query_similarity, const SimilarityParams&, Stream)
KVCACHE_NOT_YET(active_rows, const ActiveRowsParams&, Stream)
KVCACHE_NOT_YET(gather_rows, const RowsParams&, Stream)
KVCACHE_NOT_YET(scatter_rows, const RowsParams&, Stream)
}  // namespace kvcache::cuda
