// The tensor-core kernels of decode attention for float16: a file of their own, as they take long to compile.
#include "decode_mma.cuh"

namespace kvcache::cuda {

DecodeNeeds decode_needs_f16(const DecodeLaunch& d, int64_t limit) { return mma_needs<f16>(d, limit); }

int decode_on_f16(const DecodeLaunch& d, int64_t shared_bytes, void* stream) {
  return decode_on_mma<f16>(d, shared_bytes, stream);
}

}  // namespace kvcache::cuda
