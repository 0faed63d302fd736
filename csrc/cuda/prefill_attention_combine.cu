// Joins the partial results of prefill attention where the entries of a head were cut into pieces.
#include "prefill_attention.cuh"
#include "ptx/dependent_launch.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kWarps = 4;

// One warp per query row. Its lanes hold the weights of up to two pieces each, then share out the columns.
__global__ void __launch_bounds__(kWarps * 32) prefill_combine(AttentionParams p, PrefillTiles tiles) {
  static_assert(kMostPieces <= 64);
  const int lane = threadIdx.x % 32, group = p.query_heads / p.view.heads, dim = p.view.v_dim;
  const int64_t query_rows = int64_t(p.tokens) * group;
  const int64_t line = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (line >= query_rows * p.view.rows * p.view.heads) return;
  const int64_t item = line / query_rows;
  const int m = int(line % query_rows), row = int(item / p.view.heads), token = m / group;
  const int query_head = int(item % p.view.heads) * group + m % group;
  const int pieces = prefill_pieces(tiles, Entries(p, item).places);
  const Partial first = partial_of(p, tiles, item, 0, m);
  wait_for_dependencies();

  float peak[2], weight[2], top = -kInfinity, mass = 0;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int piece = j * 32 + lane;
    peak[j] = piece < pieces ? first.peak[piece * query_rows] : -kInfinity;
    top = fmaxf(top, peak[j]);
  }
  top = warp_max(top);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int piece = j * 32 + lane;
    weight[j] = exp2f(fmaxf(peak[j], kFloor) - fmaxf(top, kFloor));
    if (piece < pieces) mass += first.mass[piece * query_rows] * weight[j];
  }
  mass = warp_sum(mass);
  const bool real = !p.q_positions || p.q_positions[int64_t(row) * p.tokens + token] >= 0;
  const RowEnd end = end_row(p, query_head, real, top, mass);
  if (lane == 0) p.lse[(int64_t(row) * p.query_heads + query_head) * p.tokens + token] = end.lse;
  const int64_t out = ((int64_t(row) * p.tokens + token) * p.query_heads + query_head) * dim;
  for (int begin = 0; begin < dim; begin += 32) {
    const int d = begin + lane;
    float sum = 0;
#pragma unroll 4
    for (int piece = 0; piece < pieces; ++piece) {
      const float w = __shfl_sync(kFullWarp, piece < 32 ? weight[0] : weight[1], piece % 32);
      if (d < dim) sum += first.sums[piece * query_rows * dim + d] * w;
    }
    if (d < dim) store_as(p.out, p.q.dtype, out + d, end.factor == 0 ? 0.0f : sum * end.factor);
  }
}

}  // namespace

int prefill_attention_combine(const AttentionParams& p, const PrefillTiles& tiles, Stream stream) {
  const int64_t lines = int64_t(p.view.rows) * p.query_heads * p.tokens;
  return KVCACHE_LAUNCH_DEPENDENT(prefill_combine, ceil_divide(lines, kWarps), kWarps * 32, 0, stream, p, tiles);
}

}  // namespace kvcache::cuda
