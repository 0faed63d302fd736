// decode_attention, prefill_attention, column_sums, selection_scores, page_scores: schema, checks, scratch memory and threads.
// Semantics: python/kvcache/ops/reference.py.
#include <algorithm>
#include <limits>
#include <vector>

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

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

template <Backend B>
Tensor plan_decode(const Tensor& counts, int64_t added, int64_t most, int64_t workers) {
  const Checker check("plan_decode", B);
  PlanParams p{};
  p.counts = check.int32("counts", counts, {{"L", kAny}, {"R", kAny}, {"H", kAny}});
  p.layers = int32_t(counts.size(0));
  p.rows = int32_t(counts.size(1));
  p.heads = int32_t(counts.size(2));
  auto within = [&](const char* argument, int64_t value, int64_t least) {
    if (value < least || value > INT32_MAX) {
      check.value_error(std::string(argument) + " is " + std::to_string(value) + ", needs " + std::to_string(least) +
                        " or more");
    }
  };
  within("added", added, 0);
  within("most", most, 0);
  within("workers", workers, 0);
  p.added = int32_t(added);
  p.most = most;
  p.workers = int32_t(workers);
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, counts);
    if (p.workers == 0) p.workers = decode_workers(launch.multiprocessors());
    Tensor plan = check.empty(counts, {p.layers, decode_plan_size(p.workers)}, counts.dtype());
    p.plan = plan.mutable_data<int32_t>();
    launch.succeed(cuda::plan_decode(p, launch.stream()));
    return plan;
  } else {
    if (p.workers == 0) p.workers = abi::num_threads();
    Tensor plan = check.empty(counts, {p.layers, decode_plan_size(p.workers)}, counts.dtype());
    const int32_t items = p.rows * p.heads;
    for (int64_t i = 0; i < p.layers; ++i) {
      plan_decode_on_host(p.counts + i * items, items, p.added, p.most, p.workers,
                          plan.mutable_data<int32_t>() + i * decode_plan_size(p.workers));
    }
    return plan;
  }
}

template <Backend B>
std::tuple<Tensor, Tensor> decode_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                                            const Tensor& table, const Tensor& counts, const Tensor& positions,
                                            const OptionalTensor& window_start, const OptionalTensor& sinks,
                                            const OptionalTensor& bias, const OptionalTensor& index,
                                            const OptionalTensor& index_counts, const OptionalTensor& statistics,
                                            double scale, double softcap, double statistics_decay, bool statistics_max,
                                            bool index_pages, const OptionalTensor& plan) {
  AttentionParams p{};
  AttentionChecker check("decode_attention", B, p);
  PagedView& view = p.view;
  view = check.pages(k_pages, &v_pages, table);
  check.head_sizes(view);
  check.entries(view, counts, positions);
  check.query(q, false);
  check.window(window_start, false);
  check.sinks(sinks);
  check.bias(bias);
  check.softcap(softcap);
  check.index(index, index_counts, index_pages);
  if (statistics) {
    p.statistics = const_cast<float*>(
        check.float32("statistics", *statistics, {{"R", view.rows}, {"H", view.heads}, {"C", view.capacity}}));
  }
  check.live_pages(view);
  p.scale = float(scale);
  p.statistics_decay = float(statistics_decay);
  p.statistics_max = statistics_max;

  Tensor out = check.empty(q, {view.rows, p.query_heads, view.v_dim}, q.dtype());
  Tensor lse = check.empty(q, {view.rows, p.query_heads}, abi::aoti_torch_dtype_float32());
  p.out = out.mutable_data<void>();
  p.lse = lse.mutable_data<float>();
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, q);
    if (plan) {
      p.plan = check.int32("plan", *plan, {{"size", kAny}});
      p.plan_workers = decode_plan_workers(plan->size(0));
      if (p.plan_workers < 1) check.value_error("plan is not one that plan_decode made");
    }
    const Tensor memory = check.scratch(q, cuda::decode_attention_scratch(p, launch.multiprocessors()));
    p.scratch = memory.mutable_data<float>();
    launch.succeed(cuda::decode_attention(p, launch.multiprocessors(), launch.stream()));
  } else {
    const int64_t items = int64_t(view.rows) * view.heads;
    const int64_t most = p.index ? std::min(cpu::index_places(p), max_count(view)) : max_count(view);
    const int64_t per_head = most * (view.k_dim + view.v_dim);
    p.splits = items * per_head < grain(1) ? 1 : decode_splits(abi::num_threads(), view.rows, view.heads, most);
    Tensor memory(nullptr);
    if (const int64_t floats = cpu::decode_scratch_floats(p)) {
      memory = check.scratch(q, floats * int64_t{sizeof(float)});
      p.scratch = memory.mutable_data<float>();
    }
    abi::parallel_for(items * p.splits, grain(per_head / p.splits),
                      [&](int64_t begin, int64_t end) { cpu::table().decode_attention(p, begin, end); });
    if (p.splits > 1 || p.statistics) {
      const int64_t work = p.splits * view.v_dim + (p.statistics ? 4 * most : 0);
      abi::parallel_for(items, grain(work),
                        [&](int64_t begin, int64_t end) { cpu::table().decode_combine(p, begin, end); });
    }
  }
  return {std::move(out), std::move(lse)};
}

template <Backend B>
std::tuple<Tensor, Tensor> prefill_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                                             const Tensor& table, const Tensor& counts, const Tensor& positions,
                                             const Tensor& q_positions, const OptionalTensor& window_start,
                                             const OptionalTensor& sinks, const OptionalTensor& bias,
                                             const OptionalTensor& mask, const OptionalTensor& index,
                                             const OptionalTensor& index_counts, double scale, double softcap) {
  AttentionParams p{};
  AttentionChecker check("prefill_attention", B, p);
  PagedView& view = p.view;
  view = check.pages(k_pages, &v_pages, table);
  check.head_sizes(view);
  check.entries(view, counts, positions);
  check.query(q, true);
  check.positions(q_positions);
  check.window(window_start, true);
  check.sinks(sinks);
  check.bias(bias);
  check.mask(mask);
  check.softcap(softcap);
  check.index(index, index_counts);
  check.live_pages(view);
  p.scale = float(scale);
  p.splits = 1;

  Tensor out = check.empty(q, {view.rows, p.tokens, p.query_heads, view.v_dim}, q.dtype());
  Tensor lse = check.empty(q, {view.rows, p.query_heads, p.tokens}, abi::aoti_torch_dtype_float32());
  p.out = out.mutable_data<void>();
  p.lse = lse.mutable_data<float>();
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, q);
    const Tensor memory = check.scratch(q, cuda::prefill_attention_scratch(p, launch.multiprocessors()));
    p.scratch = memory.mutable_data<float>();
    launch.succeed(cuda::prefill_attention(p, launch.multiprocessors(), launch.stream()));
  } else {
    const int64_t block = cpu::prefill_query_block(p.query_heads, view.heads);
    const int64_t items = int64_t(view.rows) * view.heads * ceil_div(p.tokens, block);
    abi::parallel_for(items, 1, [&](int64_t begin, int64_t end) { cpu::table().prefill_attention(p, begin, end); });
  }
  return {std::move(out), std::move(lse)};
}

template <Backend B>
Tensor column_sums(const Tensor& q, const Tensor& k_pages, const Tensor& table, const Tensor& counts,
                   const Tensor& positions, const Tensor& q_positions, const Tensor& lse,
                   const OptionalTensor& window_start, const OptionalTensor& bias, const OptionalTensor& mask,
                   double scale, double softcap, int64_t last, bool reduce_max) {
  ColumnSumsParams sums{};
  AttentionParams& p = sums.attention;
  AttentionChecker check("column_sums", B, p);
  PagedView& view = p.view;
  view = check.pages(k_pages, nullptr, table);
  check.head_sizes(view);
  check.entries(view, counts, positions);
  check.query(q, true);
  check.positions(q_positions);
  check.window(window_start, true);
  check.bias(bias);
  check.mask(mask);
  check.softcap(softcap);
  sums.lse = check.float32("lse", lse, {{"R", view.rows}, {"Hq", p.query_heads}, {"T", p.tokens}});
  if (last < 0 || last > INT32_MAX) check.value_error("last is " + std::to_string(last) + ", needs 0 (all) or more");
  check.live_pages(view);
  p.scale = float(scale);
  p.splits = 1;
  sums.reduce_max = reduce_max;

  Tensor out = check.empty(q, {view.rows, view.heads, view.capacity}, abi::aoti_torch_dtype_float32());
  sums.sums = out.mutable_data<float>();
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, q);
    const Tensor begin = check.empty(q, {view.rows}, abi::aoti_torch_dtype_int32());
    sums.query_begin = begin.mutable_data<int32_t>();
    launch.succeed(cuda::query_begin({p.q_positions, view.rows, p.tokens, int32_t(last), begin.mutable_data<int32_t>()},
                                     launch.stream()));
    const Tensor memory = check.scratch(q, cuda::column_sums_scratch(sums, launch.multiprocessors()));
    p.scratch = memory.mutable_data<float>();
    launch.succeed(cuda::column_sums(sums, launch.multiprocessors(), launch.stream()));
  } else {
    // The first of the `last` real queries of each row.
    std::vector<int32_t> query_begin(view.rows, 0);
    for (int64_t r = 0; r < view.rows && last > 0; ++r) {
      int32_t t = p.tokens;
      for (int64_t real = 0; t > 0; --t) {
        real += p.q_positions[r * p.tokens + t - 1] >= 0;
        if (real > last) break;
      }
      query_begin[r] = t;
    }
    sums.query_begin = query_begin.data();
    std::fill_n(sums.sums, int64_t(view.rows) * view.heads * view.capacity, 0.0f);
    if (p.tokens == 0 || p.query_heads == 0) return out;
    const int64_t items = int64_t(view.rows) * view.heads * ceil_div(view.capacity, cpu::kColumnBlock);
    abi::parallel_for(items, 1, [&](int64_t begin, int64_t end) { cpu::table().column_sums(sums, begin, end); });
  }
  return out;
}

void listed_pages(const Checker& check, const SelectionParams& p) {
  const int64_t heads = p.per_head ? p.view.heads : 1;
  for (int64_t i = 0; i < p.view.rows * heads; ++i) {
    const int64_t n = p.page_counts[i], row = i / heads, head = p.per_head ? i % heads : 0;
    if (n < 0 || n > p.page_width) {
      check.value_error("page_counts of " + head_name(i, heads) + " is " + std::to_string(n) +
                        ", needs 0 to W=" + std::to_string(p.page_width));
    }
    const int64_t held = p.view.heads > 0 ? ceil_div(p.view.counts[row * p.view.heads + head], p.view.page_size) : 0;
    const int32_t* pages = p.pages + i * p.page_width;
    for (int64_t j = 0; j < n; ++j) {
      if (pages[j] < 0 || pages[j] >= held || (j > 0 && pages[j] <= pages[j - 1])) {
        check.value_error("pages of " + head_name(i, heads) + " lists " + std::to_string(pages[j]) +
                          ", needs ascending columns below " + std::to_string(held));
      }
    }
  }
}

// What selection_scores and page_scores share. The candidates' range and the heads' agreement.
template <class Params>
void selection_params(const AttentionChecker& check, Backend backend, const AttentionParams& attention,
                      const Tensor& first, const Tensor& end, double scale, bool soft, bool per_head, Params& p) {
  p.view = attention.view;
  p.q = attention.q;
  p.query_heads = attention.query_heads;
  p.scale = float(scale);
  p.soft = soft;
  p.per_head = per_head;
  p.first = check.int32("first", first, {{"R", p.view.rows}});
  p.end = check.int32("end", end, {{"R", p.view.rows}});
  const int64_t heads = p.view.heads, items = int64_t(p.view.rows) * heads;
  for (int64_t i = 0; i < items && !per_head && backend == Backend::kCpu; ++i) {
    if (p.view.counts[i] != p.view.counts[i / heads * heads]) {
      check.value_error("counts of " + head_name(i, heads) +
                        " differs from its row's first head; without per_head all heads must hold the same entries");
    }
  }
  check.live_pages(p.view);
}

// Memory for the weights of every query head, and each tile's peak and mass.
template <class Check>
Tensor vote_scratch(const Check& check, const Tensor& q, int64_t rows, int64_t query_heads, int64_t width) {
  return check.scratch(q, rows * query_heads * cpu::selection_line_floats(width) * int64_t{sizeof(float)});
}

template <Backend B>
Tensor selection_scores(const Tensor& q, const Tensor& k_pages, const Tensor& table, const Tensor& counts,
                        const Tensor& positions, const Tensor& first, const Tensor& end, double scale, bool soft,
                        bool per_head, const OptionalTensor& pages, const OptionalTensor& page_counts) {
  AttentionParams attention{};
  AttentionChecker check("selection_scores", B, attention);
  attention.view = check.pages(k_pages, nullptr, table);
  check.head_sizes(attention.view);
  check.entries(attention.view, counts, positions);
  check.query(q, false);
  SelectionParams p{};
  selection_params(check, B, attention, first, end, scale, soft, per_head, p);
  const int64_t heads = p.view.heads, items = int64_t(p.view.rows) * heads;
  const int64_t voting = per_head ? heads : 1, lines = p.view.rows * voting;
  int64_t width = p.view.capacity;
  if (pages.has_value() != page_counts.has_value()) check.value_error("pages and page_counts need each other");
  if (pages) {
    const Dim rows{"R", p.view.rows}, voters{"heads", voting};
    p.pages = check.int32("pages", *pages, {rows, voters, {"W", kAny}});
    p.page_width = pages->size(2);
    p.page_counts = check.int32("page_counts", *page_counts, {rows, voters});
    width = p.page_width * p.view.page_size;
    if (B == Backend::kCpu) listed_pages(check, p);
  }
  Tensor out = check.empty(q, {p.view.rows, voting, width}, abi::aoti_torch_dtype_float32());
  p.scores = out.mutable_data<float>();
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, q);
    const Tensor memory = check.scratch(q, cuda::selection_scores_scratch(p));
    p.scratch = memory.mutable_data<float>();
    launch.succeed(cuda::selection_scores(p, launch.stream()));
  } else {
    std::fill_n(p.scores, lines * width, kNegInf);
    if (items == 0 || p.query_heads == 0) return out;
    const Tensor memory = vote_scratch(check, q, p.view.rows, p.query_heads, width);
    p.scratch = memory.mutable_data<float>();
    const int64_t logit_pieces = cpu::place_pieces(width, cpu::kLogitPlaces);
    abi::parallel_for(items * logit_pieces, grain(std::min(width, cpu::kLogitPlaces) * p.view.k_dim),
                      [&](int64_t begin, int64_t end) { cpu::table().selection_logits(p, begin, end); });
    abi::parallel_for(lines * cpu::place_pieces(width, cpu::kVotePlaces),
                      grain(std::min(width, cpu::kVotePlaces) * p.query_heads / voting),
                      [&](int64_t begin, int64_t end) { cpu::table().selection_vote(p, begin, end); });
  }
  return out;
}

template <Backend B>
Tensor page_scores(const Tensor& q, const Tensor& bounds, const Tensor& table, const Tensor& counts,
                   const Tensor& positions, const Tensor& first, const Tensor& end, double scale, bool soft,
                   bool per_head) {
  AttentionParams attention{};
  AttentionChecker check("page_scores", B, attention);
  PagedView& view = attention.view;
  view.dtype = check.storage("bounds", bounds);
  check.shape("bounds", bounds, {{"P", kAny}, {"2", 2}, {"Dk", kAny}});
  view.pages = bounds.size(0);
  view.k_dim = int32_t(bounds.size(2));
  check.bounds(view, bounds);
  if (view.k_dim < 1 || view.k_dim > Checker::kMaxHeadSize) {
    check.value_error("bounds has head size " + std::to_string(view.k_dim) + ", needs 1 to " +
                      std::to_string(Checker::kMaxHeadSize));
  }
  check.table(view, "table", table);
  check.shape("positions", positions, {{"R", view.rows}, {"H", view.heads}, {"C", kAny}});
  if (view.table_width > 0 ? positions.size(2) % view.table_width != 0 : positions.size(2) != 0) {
    check.value_error("positions has a capacity of " + std::to_string(positions.size(2)) +
                      ", needs a multiple of the table's width M=" + std::to_string(view.table_width));
  }
  view.capacity = positions.size(2);
  view.page_size = view.table_width > 0 ? int32_t(view.capacity / view.table_width) : 1;
  check.entries(view, counts, positions);
  check.query(q, false);
  PageScoresParams p{};
  selection_params(check, B, attention, first, end, scale, soft, per_head, p);
  p.bounds = bounds.data<void>();
  const int64_t items = int64_t(view.rows) * view.heads, voting = per_head ? view.heads : 1;
  Tensor out = check.empty(q, {view.rows, voting, view.table_width}, abi::aoti_torch_dtype_float32());
  p.scores = out.mutable_data<float>();
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, q);
    const Tensor memory = check.scratch(q, cuda::page_scores_scratch(p));
    p.scratch = memory.mutable_data<float>();
    launch.succeed(cuda::page_scores(p, launch.stream()));
  } else {
    std::fill_n(p.scores, view.rows * voting * view.table_width, kNegInf);
    if (items == 0 || p.query_heads == 0) return out;
    const int64_t width = view.table_width;
    const Tensor memory = vote_scratch(check, q, view.rows, p.query_heads, width);
    p.scratch = memory.mutable_data<float>();
    abi::parallel_for(items * cpu::place_pieces(width, cpu::kLogitPlaces),
                      grain(2 * std::min(width, cpu::kLogitPlaces) * view.k_dim),
                      [&](int64_t begin, int64_t end) { cpu::table().page_logits(p, begin, end); });
    abi::parallel_for(view.rows * voting * cpu::place_pieces(width, cpu::kVotePlaces),
                      grain(std::min(width, cpu::kVotePlaces) * p.query_heads / std::max<int64_t>(voting, 1)),
                      [&](int64_t begin, int64_t end) { cpu::table().page_vote(p, begin, end); });
  }
  return out;
}

}  // namespace
}  // namespace bindings

const Op kAttentionOps[] = {
    {"prefill_attention",
     "prefill_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor table, Tensor counts, Tensor positions, "
     "Tensor q_positions, Tensor? window_start, Tensor? sinks, Tensor? bias, Tensor? mask, Tensor? index, "
     "Tensor? index_counts, float scale, float softcap=0.0) -> (Tensor, Tensor)",
     KVCACHE_OP(prefill_attention)},
    {"decode_attention",
     "decode_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor table, Tensor counts, Tensor positions, "
     "Tensor? window_start, Tensor? sinks, Tensor? bias, Tensor? index, Tensor? index_counts, "
     "Tensor(a!)? statistics, float scale, float softcap=0.0, float statistics_decay=1.0, "
     "bool statistics_max=False, bool index_pages=False, Tensor? plan=None) -> (Tensor, Tensor)",
     KVCACHE_OP(decode_attention)},
    {"plan_decode", "plan_decode(Tensor counts, int added, int most, int workers=0) -> Tensor",
     KVCACHE_OP(plan_decode)},
    {"column_sums",
     "column_sums(Tensor q, Tensor k_pages, Tensor table, Tensor counts, Tensor positions, Tensor q_positions, "
     "Tensor lse, Tensor? window_start, Tensor? bias, Tensor? mask, float scale, float softcap=0.0, int last=0, "
     "bool reduce_max=False) -> Tensor",
     KVCACHE_OP(column_sums)},
    {"selection_scores",
     "selection_scores(Tensor q, Tensor k_pages, Tensor table, Tensor counts, Tensor positions, Tensor first, "
     "Tensor end, float scale, bool soft=True, bool per_head=False, Tensor? pages=None, Tensor? page_counts=None) "
     "-> Tensor",
     KVCACHE_OP(selection_scores)},
    {"page_scores",
     "page_scores(Tensor q, Tensor bounds, Tensor table, Tensor counts, Tensor positions, Tensor first, Tensor end, "
     "float scale, bool soft=True, bool per_head=False) -> Tensor",
     KVCACHE_OP(page_scores)},
    {},
};

}  // namespace kvcache
