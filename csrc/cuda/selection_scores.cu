// How much the query heads vote for each candidate entry: TokenSelect's soft vote, exact. See selection_scores.cuh.
#include "selection_scores.cuh"

namespace kvcache::cuda {
namespace {

struct IsCandidate {
  __device__ __forceinline__ bool operator()(const Places& places, int64_t, int64_t, int64_t place, float&) const {
    return places.candidate(places.slot(place));
  }
};

template <int kEach>
__global__ void __launch_bounds__(kVoteThreads, 4)
    selection_vote_kernel(LogitsParams p, bool per_head, uint32_t chunks, float* scores) {
  vote<kEach>(p, per_head, chunks, IsCandidate{}, scores);
}

LogitsParams logits_params(const SelectionParams& s) {
  const PagedView& view = s.view;
  LogitsParams p{};
  p.pool = view.k_pages;
  p.table = view.table;
  p.counts = view.counts;
  p.positions = view.positions;
  p.first = s.first;
  p.end = s.end;
  p.pages = s.pages;
  p.page_counts = s.page_counts;
  p.q = s.q;
  p.dtype = view.dtype;
  p.rows = view.rows;
  p.heads = view.heads;
  p.lists = s.per_head ? view.heads : 1;
  p.group = view.heads > 0 ? s.query_heads / view.heads : 0;
  p.dim = view.k_dim;
  p.page_size = view.page_size;
  p.table_width = view.table_width;
  p.unit = 1;
  p.capacity = view.capacity;
  p.page_width = s.page_width;
  p.width = s.page_counts ? s.page_width * view.page_size : view.capacity;
  p.soft = s.soft;
  p.scale = s.soft ? s.scale * kLog2E : s.scale;
  p.active = s.active;
  place_scratch(p, s.scratch);
  return p;
}

}  // namespace

void place_scratch(LogitsParams& p, float* scratch) {
  p.plan = selection_plan(p.rows, p.heads, p.width);
  p.logits = scratch;
  p.parts = reinterpret_cast<float2*>(scratch + p.plan.part_offset(int64_t(p.rows) * p.heads * p.group));
  constexpr int64_t kKept = 16 << 20;  // bytes that a later kernel may still find in the L2
  p.once = int64_t(p.rows) * p.heads * p.width * p.dim * (p.dtype == DType::kFloat32 ? 4 : 2) > kKept;
}

int logits(const LogitsParams& p, Stream stream) {
  if (int64_t(p.rows) * p.heads * p.group * p.width == 0) return 0;
  return fits_mma(p) ? logits_mma(p, stream) : logits_general(p, stream);
}

int64_t selection_scores_scratch(const SelectionParams& p) {
  const int64_t width = p.page_counts ? p.page_width * p.view.page_size : p.view.capacity;
  return selection_plan(p.view.rows, p.view.heads, width).floats(int64_t(p.view.rows) * p.query_heads) * 4;
}

int selection_scores(const SelectionParams& s, Stream stream) {
  const LogitsParams p = logits_params(s);
  const int64_t lines = int64_t(p.rows) * (s.per_head ? p.heads : 1), shared = vote_shared(p, s.per_head);
  if (lines * p.width == 0) return 0;
  if (const int error = logits(p, stream)) return error;
  const bool one = vote_one_each(lines, p.width);
  const int64_t places = kVoteThreads * (one ? 1 : 4), chunks = (p.width + places - 1) / places;
  return one ? KVCACHE_LAUNCH_DEPENDENT(selection_vote_kernel<1>, lines * chunks, kVoteThreads, shared, stream, p,
                                        s.per_head, chunks, s.scores)
             : KVCACHE_LAUNCH_DEPENDENT(selection_vote_kernel<4>, lines * chunks, kVoteThreads, shared, stream, p,
                                        s.per_head, chunks, s.scores);
}

}  // namespace kvcache::cuda
