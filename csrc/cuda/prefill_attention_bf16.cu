// The tensor-core kernels of prefill attention for bfloat16; in a file of their own, so that they compile beside the others.
#include "prefill_attention_mma.cuh"

namespace kvcache::cuda {

int prefill_attention_bf16(const AttentionParams& p, const PrefillTiles& tiles, Stream stream) {
  return launch_prefill<bf16>(p, tiles, stream);
}

}  // namespace kvcache::cuda
