// latent_attention: schema, checks, scratch memory and threads. Semantics: python/kvcache/ops/reference.py.
#include "../core/decode_plan.h"
#include "../core/split.h"
#include "../cpu/attention_plan.h"
#include "../cpu/kernels.h"
#include "../cuda/kernels.h"
#include "attention_checker.h"
#include "torch_ops.h"

namespace kvcache {
namespace bindings {
namespace {

constexpr int64_t kMaxLatent = 512, kMaxRope = 128;

template <Backend B>
std::tuple<Tensor, Tensor> latent_attention(const Tensor& q_latent, const Tensor& q_rope, const Tensor& k_pages,
                                            const Tensor& v_pages, const Tensor& table, const Tensor& counts,
                                            const Tensor& positions, const OptionalTensor& q_positions,
                                            const OptionalTensor& window_start, const OptionalTensor& statistics,
                                            double scale, double softcap, double statistics_decay, bool statistics_max,
                                            const OptionalTensor& plan) {
  LatentParams all{};
  AttentionParams& p = all.attention;
  AttentionChecker check("latent_attention", B, p);
  PagedView& view = p.view;
  view = check.pages(k_pages, &v_pages, table);
  auto width = [&](const char* name, int64_t size, int64_t most) {
    if (size < 1 || size > most) {
      check.value_error(std::string(name) + " has width " + std::to_string(size) + ", needs 1 to " +
                        std::to_string(most));
    }
  };
  width("k_pages", view.k_dim, kMaxLatent);
  width("v_pages", view.v_dim, kMaxRope);
  if (view.heads != 1) check.value_error("table has " + std::to_string(view.heads) + " heads, needs 1");
  check.entries(view, counts, positions);
  p.q = check.strided4("q_latent", q_latent, {{"R", view.rows}, {"Hq", kAny}, {"T", kAny}, {"L", view.k_dim}});
  p.query_heads = int32_t(q_latent.size(1)), p.tokens = int32_t(q_latent.size(2));
  all.q_rope =
      check.strided4("q_rope", q_rope, {{"R", view.rows}, {"Hq", p.query_heads}, {"T", p.tokens}, {"Dr", view.v_dim}});
  if (all.q_rope.dtype != p.q.dtype) check.type_error("q_rope has another dtype than q_latent");
  if (q_positions) check.positions(*q_positions);
  check.window(window_start, true);
  check.softcap(softcap);
  if (statistics) {
    if (p.tokens != 1) check.value_error("statistics needs T=1, q_latent has T=" + std::to_string(p.tokens));
    p.statistics = const_cast<float*>(
        check.float32("statistics", *statistics, {{"R", view.rows}, {"H", 1}, {"C", view.capacity}}));
  }
  check.live_pages(view);
  p.scale = float(scale);
  p.statistics_decay = float(statistics_decay);
  p.statistics_max = statistics_max;

  const int64_t queries = int64_t(p.tokens) * p.query_heads;  // of a row
  Tensor out = check.empty(q_latent, {view.rows, p.tokens, p.query_heads, view.k_dim}, q_latent.dtype());
  Tensor lse = check.empty(q_latent, {view.rows, p.tokens, p.query_heads}, abi::aoti_torch_dtype_float32());
  p.out = out.mutable_data<void>();
  p.lse = lse.mutable_data<float>();
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, q_latent);
    if (plan) {
      p.plan = check.int32("plan", *plan, {{"size", kAny}});
      p.plan_workers = decode_plan_workers(plan->size(0));
      if (p.plan_workers < 1) check.value_error("plan is not one that plan_decode made");
    }
    const Tensor memory = check.scratch(q_latent, cuda::latent_attention_scratch(all, launch.multiprocessors()));
    p.scratch = memory.mutable_data<float>();
    launch.succeed(cuda::latent_attention(all, launch.multiprocessors(), launch.stream()));
  } else {
    p.splits = 1;
    if (view.rows == 0 || queries == 0) return {std::move(out), std::move(lse)};
    const int64_t blocks = ceil_div(p.tokens, cpu::prefill_query_block(p.query_heads, 1)), items = view.rows * blocks;
    const int64_t most = max_count(view), work = most * queries / blocks * (2 * view.k_dim + view.v_dim);
    p.splits = items * work < grain(1) ? 1 : decode_splits(abi::num_threads(), view.rows, blocks, most);
    Tensor memory(nullptr);
    if (const int64_t floats = cpu::latent_scratch_floats(all)) {
      memory = check.scratch(q_latent, floats * int64_t{sizeof(float)});
      p.scratch = memory.mutable_data<float>();
    }
    abi::parallel_for(items * p.splits, grain(work / p.splits),
                      [&](int64_t begin, int64_t end) { cpu::table().latent_attention(all, begin, end); });
    if (p.splits > 1) {
      abi::parallel_for(view.rows * queries, grain(p.splits * view.k_dim),
                        [&](int64_t begin, int64_t end) { cpu::table().latent_combine(all, begin, end); });
    }
    if (p.statistics) {
      abi::parallel_for(view.rows * ceil_div(view.capacity, cpu::kLatentColumns),
                        grain(4 * cpu::kLatentColumns * p.query_heads),
                        [&](int64_t begin, int64_t end) { cpu::table().latent_statistics(all, begin, end); });
    }
  }
  return {std::move(out), std::move(lse)};
}

}  // namespace
}  // namespace bindings

const Op kLatentOps[] = {
    {"latent_attention",
     "latent_attention(Tensor q_latent, Tensor q_rope, Tensor k_pages, Tensor v_pages, Tensor table, Tensor counts, "
     "Tensor positions, Tensor? q_positions, Tensor? window_start, Tensor(a!)? statistics, float scale, "
     "float softcap=0.0, float statistics_decay=1.0, bool statistics_max=False, Tensor? plan=None) "
     "-> (Tensor, Tensor)",
     KVCACHE_OP(latent_attention)},
    {},
};

}  // namespace kvcache
