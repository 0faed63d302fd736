// An upper bound of the logits of every page, from the smallest and largest key of each channel, and the heads' vote over
// it (Quest, arXiv 2406.10774): the first stage of a selection in two stages. See selection_scores.cuh.
#include "selection_scores.cuh"

namespace kvcache::cuda {
namespace {

// Pages of the sinks and of the local window must be on the shortlist whatever their keys are.
struct IsOpenPage {
  const int32_t* counts;     // [rows, heads]
  const int32_t* positions;  // [rows, heads, capacity]
  int64_t capacity;
  int32_t page_size, heads;

  __device__ __forceinline__ bool operator()(const Places& places, int64_t row, int64_t head, int64_t place,
                                             float& score) const {
    const int64_t line = row * heads + head, begin = place * page_size, count = counts[line];
    const int entries = int(count - begin < page_size ? count - begin : page_size);
    const int32_t* position = positions + line * capacity + begin;
    bool guarded = false;
#pragma unroll 8
    for (int i = 0; i < entries; ++i) guarded |= position[i] < places.first || position[i] >= places.end;
    if (guarded) score = INFINITY;
    return !guarded;
  }
};

__global__ void __launch_bounds__(kVoteThreads, 4)
    page_vote_kernel(LogitsParams p, bool per_head, uint32_t chunks, IsOpenPage kind, float* scores) {
  vote<1>(p, per_head, chunks, kind, scores);
}

}  // namespace

int64_t page_scores_scratch(const PageScoresParams& p) {
  return selection_plan(p.view.rows, p.view.heads, p.view.table_width).floats(int64_t(p.view.rows) * p.query_heads) * 4;
}

int page_scores(const PageScoresParams& s, Stream stream) {
  const PagedView& view = s.view;
  LogitsParams p{};
  p.pool = s.bounds;
  p.table = view.table;
  p.counts = view.counts;
  p.first = s.first;
  p.end = s.end;
  p.q = s.q;
  p.dtype = view.dtype;
  p.rows = view.rows;
  p.heads = view.heads;
  p.lists = 1;
  p.group = view.heads > 0 ? s.query_heads / view.heads : 0;
  p.dim = 2 * view.k_dim;
  p.page_size = 1;
  p.table_width = view.table_width;
  p.unit = view.page_size;
  p.width = view.table_width;
  p.soft = s.soft;
  p.bounds = true;
  p.scale = s.soft ? s.scale * kLog2E : s.scale;
  p.active = s.active;
  place_scratch(p, s.scratch);
  const int64_t lines = int64_t(p.rows) * (s.per_head ? p.heads : 1);
  if (lines * p.width == 0) return 0;
  if (const int error = logits(p, stream)) return error;
  const int64_t chunks = (p.width + kVoteThreads - 1) / kVoteThreads;
  const IsOpenPage kind{view.counts, view.positions, view.capacity, view.page_size, view.heads};
  return KVCACHE_LAUNCH_DEPENDENT(page_vote_kernel, lines * chunks, kVoteThreads, vote_shared(p, s.per_head), stream, p,
                                  s.per_head, chunks, kind, s.scores);
}

}  // namespace kvcache::cuda
