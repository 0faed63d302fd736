// For each row the first of its `last` real queries: where the observation window of column_sums begins.
#include "device.cuh"
#include "kernels.h"

namespace kvcache::cuda {
namespace {

constexpr int kWarps = 4;

// One warp per row walks back from the end, 32 queries at a time, until it has met `last` real ones.
__global__ void query_begin_kernel(QueryBeginParams p) {
  const int row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= p.rows) return;
  const int32_t* positions = p.q_positions + int64_t(row) * p.tokens;  // [tokens]
  int begin = 0, met = 0;
  for (int top = p.tokens; p.last > 0 && top > 0; top -= 32) {
    const int t = top - 1 - lane;  // lane 0 is the latest
    unsigned real = __ballot_sync(~0u, t >= 0 && positions[t] >= 0);
    if (met + __popc(real) > p.last) {  // the query after the (last + 1)-th real one, counted from the end
      for (int skip = p.last - met; skip > 0; --skip) real &= real - 1;
      begin = top - __ffs(int(real)) + 1;
      break;
    }
    met += __popc(real);
  }
  if (lane == 0) p.query_begin[row] = begin;
}

}  // namespace

int query_begin(const QueryBeginParams& p, Stream stream) {
  if (p.rows == 0) return 0;
  return KVCACHE_LAUNCH(query_begin_kernel, dim3((p.rows + kWarps - 1) / kWarps), dim3(kWarps * 32), 0, stream, p);
}

}  // namespace kvcache::cuda
