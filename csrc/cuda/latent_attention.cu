// Latent attention: which kernel, how large its blocks and its scratch memory are, and the launches.
//
// Absorbed MLA: every latent is read once for 64 query rows, as key and as value. Work is shared out, and what several
// blocks share is merged, as in decode attention (core/decode_plan.h, decode_combine.cu).
#include "latent_attention.cuh"

#include "kernels.h"
#include "plan_decode.cuh"

namespace kvcache::cuda {
namespace {

enum class Kernel { kMma, kPlain, kFew };

// Query rows of one launch: each block leaves partial results for all of them.
constexpr int32_t kMostRows = 256;

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }
int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

bool aligned_rows(const Strided4& q) {
  return aligned(q.data, 16) && q.stride[0] % 8 == 0 && q.stride[1] % 8 == 0 && q.stride[2] % 8 == 0;
}

struct Prepared {
  LatentLaunch launch;
  Kernel kernel;
  int64_t shared_bytes;
  int32_t* own_plan;  // or null
  int64_t scratch;    // bytes
};

// Everything about the launch for the tokens from `first` on that shapes and pointers decide.
Prepared prepare(const LatentParams& all, int32_t first, int multiprocessors) {
  Prepared result{};
  LatentLaunch& d = result.launch;
  const PagedView& view = all.attention.view;
  d.p = all.attention;
  d.q_rope = all.q_rope;
  d.heads = d.p.query_heads, d.tokens = d.p.tokens, d.first_token = first;
  d.latent = view.k_dim, d.rope = view.v_dim;
  const int32_t most = d.heads < kMostRows ? kMostRows / d.heads : 1, left = d.tokens - first;
  d.group = (left < most ? left : most) * d.heads;
  d.q_positions = d.p.q_positions;
  if (d.tokens > 1) d.q_start = d.p.window_start, d.p.window_start = nullptr;
  // As the frame sees it: all query rows are heads of the one group, and a value is a latent.
  d.p.query_heads = d.heads * d.tokens, d.p.tokens = 1;
  d.p.view.v_dim = d.latent;
  const int64_t offset = int64_t(first) * d.heads;
  const int out_bytes = d.p.q.dtype == DType::kFloat32 ? 4 : 2;
  d.p.out = static_cast<char*>(d.p.out) + offset * d.latent * out_bytes;
  d.p.lse += offset;
  d.scale_in_cap = d.p.softcap > 0.0f ? d.p.scale / d.p.softcap : 0.0f;
  d.page_size = Divisor::of(view.page_size);
  d.aligned_q = aligned_rows(d.p.q) && aligned_rows(d.q_rope);
  const int64_t element = view.dtype == DType::kFloat32 ? 4 : 2;
  d.grain = 16;
  while (!aligned(view.k_pages, d.grain) || !aligned(view.v_pages, d.grain) || d.latent * element % d.grain ||
         d.rope * element % d.grain) {
    d.grain /= 2;
  }
  d.k_pieces = Divisor::of(int32_t(d.latent * element / d.grain));
  d.v_pieces = Divisor::of(int32_t(d.rope * element / d.grain));

  const bool tensor_cores = view.dtype != DType::kFloat32 && d.p.q.dtype == view.dtype && d.latent % 16 == 0 &&
                            d.rope % 16 == 0 && d.grain == 16 &&
                            view.pages * view.page_size < (int64_t(1) << 32);  // LatentMmaCore::Row
  const int64_t limit = shared_memory_limit() - 128;                           // what the kernels declare themselves
  DecodeNeeds needs{};
  result.kernel = Kernel::kMma;
  if (tensor_cores) needs = latent_needs_mma(d, limit);
  if (needs.block.parts == 0) result.kernel = Kernel::kPlain, needs = latent_needs_plain(d, false, limit);
  if (needs.block.parts == 0) result.kernel = Kernel::kFew, needs = latent_needs_plain(d, true, limit);
  d.parts = needs.block.parts, d.stages = needs.block.stages;
  result.shared_bytes = needs.shared_bytes;

  const int64_t items = view.rows, places = view.capacity;
  d.workers = d.p.plan ? d.p.plan_workers : multiprocessors > 0 ? multiprocessors : 1;
  if (!d.p.plan) {  // no more than there can be units
    const int64_t units = items * (places / kPlanUnit + 1);
    if (units < d.workers) d.workers = int32_t(units);
  }
  char* next = reinterpret_cast<char*>(d.p.scratch);
  const auto take = [&](int64_t bytes) {
    char* here = next;
    next += round_up(bytes, 16);
    return here;
  };
  if (!d.p.plan) {
    result.own_plan = reinterpret_cast<int32_t*>(take(decode_plan_size(d.workers) * sizeof(int32_t)));
    d.plan = reinterpret_cast<const DecodePlan*>(result.own_plan);
  } else {
    d.plan = reinterpret_cast<const DecodePlan*>(d.p.plan);
  }
  const int64_t partials = 2 * int64_t(d.workers) * d.group;
  d.partial_state = reinterpret_cast<float2*>(take(partials * sizeof(float2)));
  d.partial_out = reinterpret_cast<float*>(take(partials * d.latent * sizeof(float)));
  if (d.p.statistics) {  // of one token, so that the group is its heads
    d.half_weights = result.kernel == Kernel::kMma;
    d.weight_heads = d.half_weights ? (d.group + 1) / 2 * 2 : d.group;
    d.places = round_up(places, kPlanUnit);
    d.weights = take(items * d.places * d.weight_heads * (d.half_weights ? 2 : 4));
  }
  result.scratch = next - reinterpret_cast<char*>(d.p.scratch);
  return result;
}

bool nothing_to_do(const LatentParams& p) {
  return p.attention.view.rows == 0 || p.attention.query_heads == 0 || p.attention.tokens == 0;
}

int plan_rows(const LatentLaunch& d, int32_t* plan, Stream stream) {
  PlanInput in{};
  in.counts = d.p.view.counts;
  in.layers = 1, in.rows = d.p.view.rows, in.heads = in.counted_heads = 1;
  in.factor = 1;
  in.most = d.p.view.capacity;
  in.width = int32_t(in.most);
  in.workers = d.workers, in.plan = plan;
  return plan_items(in, stream);
}

}  // namespace

int64_t latent_attention_scratch(const LatentParams& p, int multiprocessors) {
  return nothing_to_do(p) ? 0 : prepare(p, 0, multiprocessors).scratch;  // the first launch has the most tokens
}

int latent_attention(const LatentParams& p, int multiprocessors, Stream stream) {
  if (nothing_to_do(p)) return 0;
  for (int32_t first = 0; first < p.attention.tokens;) {
    const Prepared prepared = prepare(p, first, multiprocessors);
    const LatentLaunch& d = prepared.launch;
    if (prepared.own_plan) {
      if (const int error = plan_rows(d, prepared.own_plan, stream)) return error;
    }
    int error = 0;
    if (prepared.kernel == Kernel::kMma) error = latent_on_mma(d, prepared.shared_bytes, stream);
    else error = latent_on_plain(d, prepared.kernel == Kernel::kFew, prepared.shared_bytes, stream);
    if (!error && d.workers > 1) error = decode_combine(d, stream);
    if (error) return error;
    first += d.group / d.heads;
  }
  return 0;
}

}  // namespace kvcache::cuda
