// All CPU kernels for one instruction set. CMake compiles this file once per set with KVCACHE_ISA_NS, KVCACHE_ISA_NAME
// and the compiler's flags. Nothing here may leave a symbol that another translation unit could share (an inline function,
// a template of the standard library): the linker might keep the copy with the widest instructions for everybody. Hence:
// C headers only, everything static or in the set's namespace. tests/bindings/test_abi.py checks the objects' symbols.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

// clang-format off: the order matters
#include "convert.inl"
#include "page_bounds.inl"
#include "append.inl"
#include "copy_pages.inl"
#include "compact.inl"
#include "overwrite.inl"
#include "topk.inl"
#include "choose_victims.inl"
#include "rows.inl"
#include "decode_attention.inl"
#include "prefill_attention.inl"
#include "latent_attention.inl"
#include "column_sums.inl"
#include "selection_scores.inl"
#include "page_scores.inl"
#include "query_similarity.inl"
#include "select_tokens.inl"
#include "probe.inl"
// clang-format on

namespace kvcache::cpu::KVCACHE_ISA_NS {

extern const Table table;  // declared first: a const object is otherwise private to this file
const Table table = {
    .isa = KVCACHE_ISA_NAME,
    .append = append,
    .copy_pages = copy_pages,
    .compact = compact,
    .overwrite = overwrite,
    .decode_attention = decode_attention,
    .decode_combine = decode_combine,
    .prefill_attention = prefill_attention,
    .latent_attention = latent_attention,
    .latent_combine = latent_combine,
    .latent_statistics = latent_statistics,
    .column_sums = column_sums,
    .selection_logits = selection_logits,
    .selection_vote = selection_vote,
    .topk = topk,
    .choose_victims = choose_victims,
    .page_bounds = page_bounds,
    .page_logits = page_logits,
    .page_vote = page_vote,
    .query_similarity = query_similarity,
    .select_begin = select_begin,
    .active_rows = active_rows,
    .gather_rows = gather_rows,
    .scatter_rows = scatter_rows,
    .probe_read = probe_read,
    .probe_fma = probe_fma,
};

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
