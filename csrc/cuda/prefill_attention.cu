// Attention of T queries per row over pages: chooses the kernel. Semantics: prefill_attention in ops/reference.py.
#include "prefill_attention.cuh"

namespace kvcache::cuda {

int64_t prefill_attention_scratch(const AttentionParams& p, int multiprocessors) {
  return prefill_scratch_floats(p, prefill_tiles(p, multiprocessors)) * int64_t{sizeof(float)};
}

int prefill_attention(const AttentionParams& p, int multiprocessors, Stream stream) {
  if (p.view.rows == 0 || p.query_heads == 0 || p.tokens == 0) return 0;
  const PrefillTiles tiles = prefill_tiles(p, multiprocessors);
  const int error = tiles.kernel == PrefillKernel::kGeneral ? prefill_attention_general(p, tiles, stream)
                    : p.view.dtype == DType::kBFloat16      ? prefill_attention_bf16(p, tiles, stream)
                                                            : prefill_attention_f16(p, tiles, stream);
  return error != 0 || tiles.splits == 1 ? error : prefill_attention_combine(p, tiles, stream);
}

}  // namespace kvcache::cuda
