// The tensor-core kernels of decode attention for bfloat16: a file of their own, as they take long to compile.
#include "decode_mma.cuh"

namespace kvcache::cuda {

DecodeNeeds decode_needs_bf16(const DecodeLaunch& d, int64_t limit) { return mma_needs<bf16>(d, limit); }

int decode_on_bf16(const DecodeLaunch& d, int64_t shared_bytes, void* stream) {
  return decode_on_mma<bf16>(d, shared_bytes, stream);
}

}  // namespace kvcache::cuda
