// select_tokens: schema, checks, scratch memory and threads. Semantics: python/kvcache/ops/reference.py.
#include <algorithm>
#include <limits>
#include <vector>

#include "../cpu/attention_plan.h"
#include "../cpu/kernels.h"
#include "../cuda/kernels.h"
#include "attention_checker.h"

namespace kvcache {
namespace bindings {
namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// The numbers and the lists; everything that says what a row has chosen so far.
void check_state(const Checker& check, Backend backend, const SelectTokensParams& p, int64_t sinks, int64_t k,
                 int64_t local) {
  auto at_least = [&](const char* name, int64_t value, int64_t least) {
    if (value < least) {
      check.value_error(std::string(name) + " is " + std::to_string(value) + ", needs " + std::to_string(least) +
                        " or more");
    }
  };
  at_least("sinks", sinks, 0);
  at_least("k", k, 1);
  at_least("local", local, 1);
  const int64_t most = sinks + k + local;
  if (p.width < most) {
    check.value_error("index has room for " + std::to_string(p.width) +
                      " slots, needs sinks + k + local = " + std::to_string(most));
  }
  for (int64_t r = 0; r < p.view.rows && backend == Backend::kCpu; ++r) {
    if (p.index_counts[r] < 0 || p.index_counts[r] > p.width) {
      check.value_error("index_counts of row " + std::to_string(r) + " is " + std::to_string(p.index_counts[r]) +
                        ", needs 0 to W=" + std::to_string(p.width));
    }
    if (p.until[r] < p.index_counts[r]) {
      check.value_error("until of row " + std::to_string(r) + " is " + std::to_string(p.until[r]) + ", needs the " +
                        std::to_string(p.index_counts[r]) + " slots of its list or more");
    }
  }
}

// Where the candidates of a row come from: all entries, or those of its shortlist of pages, which this finds first.
struct Scored {
  SelectionParams scores{};
  TopKParams topk{};
  std::vector<Tensor> memory;

  float* floats(const Checker& check, const Tensor& like, int64_t n) {
    memory.push_back(check.scratch(like, n * int64_t{sizeof(float)}));
    return memory.back().mutable_data<float>();
  }
  int32_t* ints(const Checker& check, const Tensor& like, int64_t n) {
    return reinterpret_cast<int32_t*>(floats(check, like, n));
  }
};

// Runs `kernel` for the `items` of every one of some rows.
template <class Params>
void each_row(const std::vector<int64_t>& rows, int64_t items, int64_t work, const Params& p,
              void (*kernel)(const Params&, int64_t, int64_t)) {
  abi::parallel_for(int64_t(rows.size()) * items, grain(work), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = rows[begin / items], from = begin % items, n = std::min(items - from, end - begin);
      kernel(p, row * items + from, row * items + from + n);
      begin += n;
    }
  });
}

// The vote of all heads over lines of `width` places; `work`: per place and head.
template <class Params>
void vote(const std::vector<int64_t>& rows, int64_t width, int64_t work, const Params& p,
          void (*logits)(const Params&, int64_t, int64_t), void (*sums)(const Params&, int64_t, int64_t)) {
  each_row(rows, p.view.heads * cpu::place_pieces(width, cpu::kLogitPlaces), std::min(width, cpu::kLogitPlaces) * work,
           p, logits);
  each_row(rows, cpu::place_pieces(width, cpu::kVotePlaces), std::min(width, cpu::kVotePlaces) * p.query_heads, p,
           sums);
}

// Lines of [rows, 1, capacity] of the whole row's positions and counts, for topk.
TopKParams ranked(const SelectTokensParams& p) {
  const PagedView& view = p.view;
  TopKParams t{};
  t.rows = view.rows;
  t.heads = 1;
  t.first = p.first;
  t.end = p.end;
  t.counts = view.counts;
  t.counts_stride[0] = view.heads;
  t.positions = view.positions;
  t.positions_stride[0] = view.heads * view.capacity;
  t.capacity = view.capacity;
  t.k = &p.k;  // for all rows
  return t;
}

void shortlist_pages(const Checker& check, const Tensor& like, const SelectTokensParams& p,
                     const std::vector<int64_t>& rows, Scored& s) {
  const PagedView& view = p.view;
  const int64_t columns = view.table_width, listed = std::min(p.shortlist, columns);
  PageScoresParams bound{};
  bound.view = view;
  bound.bounds = p.bounds;
  bound.q = p.q;
  bound.first = p.first;
  bound.end = p.end;
  bound.query_heads = p.query_heads;
  bound.scale = p.scale;
  bound.soft = p.soft;
  bound.scores = s.floats(check, like, view.rows * columns);
  bound.scratch = s.floats(check, like, int64_t(view.rows) * p.query_heads * cpu::selection_line_floats(columns));
  // To topk a page is an entry whose position is its column, and all are candidates.
  TopKParams t{};
  t.rows = view.rows;
  t.heads = 1;
  t.scores = bound.scores;
  t.scores_stride[0] = t.capacity = columns;
  int32_t* numbers = s.ints(check, like, columns + 1);
  for (int64_t i = 0; i <= columns; ++i) numbers[i] = int32_t(i);
  t.positions = numbers;
  t.k = numbers + listed;
  int32_t* lines = s.ints(check, like, 4 * view.rows);
  int32_t *held = lines, *zero = lines + view.rows, *all = zero + view.rows, *page_counts = all + view.rows;
  for (int64_t r : rows) {
    held[r] = int32_t(ceil_div(view.counts[r * view.heads], view.page_size));
    zero[r] = 0;
    all[r] = int32_t(columns);
    std::fill_n(bound.scores + r * columns, columns, kNegInf);
  }
  t.counts = held;
  t.counts_stride[0] = 1;
  t.first = zero;
  t.end = all;
  t.width = listed;
  t.index = s.ints(check, like, view.rows * listed);
  t.index_counts = page_counts;
  vote(rows, columns, 2 * view.k_dim, bound, cpu::table().page_logits, cpu::table().page_vote);
  each_row(rows, 1, 8 * columns, t, cpu::table().topk);
  s.scores.pages = s.topk.pages = t.index;
  s.scores.page_counts = s.topk.page_counts = page_counts;
  s.scores.page_width = s.topk.page_width = s.topk.pages_stride[0] = listed;
  s.topk.page_counts_stride[0] = 1;
  s.topk.page_size = view.page_size;
}

void select_on_cpu(const Checker& check, const Tensor& like, SelectTokensParams& p) {
  const PagedView& view = p.view;
  if (view.rows == 0 || view.heads == 0 || p.query_heads == 0) return;
  Scored s;
  int32_t* lines = s.ints(check, like, 3 * int64_t(view.rows));
  p.active = lines;
  p.first = lines + view.rows;
  p.end = p.first + view.rows;
  const int64_t line = int64_t(p.query_heads) * view.k_dim;
  if (p.cos) p.plain = s.floats(check, like, view.rows * line);
  abi::parallel_for(view.rows, grain(3 * line),
                    [&](int64_t begin, int64_t end) { cpu::table().select_begin(p, begin, end); });
  std::vector<int64_t> rows;
  for (int64_t r = 0; r < view.rows; ++r) {
    if (p.active[r]) rows.push_back(r);
  }
  if (rows.empty()) return;

  s.topk = ranked(p);
  SelectionParams& votes = s.scores;
  votes.view = view;
  votes.q = p.q;
  votes.first = p.first;
  votes.end = p.end;
  votes.query_heads = p.query_heads;
  votes.scale = p.scale;
  votes.soft = p.soft;
  if (p.bounds) shortlist_pages(check, like, p, rows, s);
  const int64_t width = votes.page_counts ? votes.page_width * view.page_size : view.capacity;
  votes.scores = s.floats(check, like, view.rows * width);
  votes.scratch = s.floats(check, like, int64_t(view.rows) * p.query_heads * cpu::selection_line_floats(width));
  for (int64_t r : rows) std::fill_n(votes.scores + r * width, width, kNegInf);
  const int64_t most = std::min(width, max_count(view));
  vote(rows, width, view.k_dim, votes, cpu::table().selection_logits, cpu::table().selection_vote);
  s.topk.scores = votes.scores;
  s.topk.scores_stride[0] = width;
  s.topk.index = p.index;
  s.topk.index_counts = p.index_counts;
  s.topk.width = p.width;
  each_row(rows, 1, 8 * most, s.topk, cpu::table().topk);
}

template <Backend B>
void select_tokens(const Tensor& q, const Tensor& k_pages, const Tensor& table, const Tensor& counts,
                   const Tensor& positions, const Tensor& q_positions, const OptionalTensor& cos,
                   const OptionalTensor& sin, const OptionalTensor& bounds, const Tensor& query, const Tensor& index,
                   const Tensor& index_counts, const Tensor& until, const Tensor& at, const Tensor& events,
                   int64_t sinks, int64_t k, int64_t local, double reuse, double scale, bool soft, int64_t shortlist) {
  AttentionParams attention{};
  AttentionChecker check("select_tokens", B, attention);
  attention.view = check.pages(k_pages, nullptr, table);
  check.head_sizes(attention.view);
  check.entries(attention.view, counts, positions);
  check.query(q, false);
  SelectTokensParams p{};
  const PagedView& view = p.view = attention.view;
  p.q = attention.q;
  p.query_heads = attention.query_heads;
  const Dim rows{"R", view.rows}, dim{"Dk", view.k_dim};
  p.q_positions = check.int32("q_positions", q_positions, {rows});
  if (cos.has_value() != sin.has_value()) check.value_error("cos and sin need each other");
  if (cos) {
    p.cos = check.float32("cos", *cos, {rows, {"half", kAny}});
    p.half = int32_t(cos->size(1));
    p.sin = check.float32("sin", *sin, {rows, {"half", p.half}});
    if (2 * p.half > view.k_dim) {
      check.value_error("cos has " + std::to_string(p.half) +
                        " angles, needs at most half of Dk=" + std::to_string(view.k_dim));
    }
  }
  if (bounds) {
    p.bounds = check.bounds(view, *bounds);
    if (shortlist < 1) check.value_error("shortlist is " + std::to_string(shortlist) + ", needs 1 or more with bounds");
    p.shortlist = shortlist;
  }
  if (check.storage("query", query) != p.q.dtype) check.type_error("query has another dtype than q");
  check.shape("query", query, {rows, {"Hq", p.query_heads}, dim});
  check.contiguous("query", query);
  check.device("query", query);
  const Dim one{"1", 1};
  p.index = const_cast<int32_t*>(check.int32("index", index, {rows, one, {"W", kAny}}));
  p.width = index.size(2);
  p.index_counts = const_cast<int32_t*>(check.int32("index_counts", index_counts, {rows, one}));
  p.until = const_cast<int32_t*>(check.int32("until", until, {rows}));
  p.at = const_cast<int32_t*>(check.int32("at", at, {rows}));
  p.events = const_cast<int32_t*>(check.int32("events", events, {{"2", 2}}));
  p.query = const_cast<void*>(query.data<void>());
  p.sinks = int32_t(sinks);
  p.k = int32_t(k);
  p.local = int32_t(local);
  p.reuse = float(reuse);
  p.scale = float(scale);
  p.soft = soft;
  for (int64_t i = 0; i < int64_t(view.rows) * view.heads && B == Backend::kCpu; ++i) {
    if (view.counts[i] != view.counts[i / view.heads * view.heads]) {
      check.value_error("counts of " + head_name(i, view.heads) +
                        " differs from its row's first head; all heads must hold the same entries");
    }
  }
  check.live_pages(view);
  check_state(check, B, p, sinks, k, local);
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, q);
    const Tensor memory = check.scratch(q, cuda::select_tokens_scratch(p));
    launch.succeed(cuda::select_tokens(p, memory.mutable_data<void>(), launch.stream()));
  } else {
    select_on_cpu(check, q, p);
  }
}

}  // namespace
}  // namespace bindings

const Op kSelectTokensOps[] = {
    {"select_tokens",
     "select_tokens(Tensor q, Tensor k_pages, Tensor table, Tensor counts, Tensor positions, Tensor q_positions, "
     "Tensor? cos, Tensor? sin, Tensor? bounds, Tensor(a!) query, Tensor(b!) index, Tensor(c!) index_counts, "
     "Tensor(d!) until, Tensor(e!) at, Tensor(f!) events, int sinks, int k, int local, float reuse, "
     "float scale=1.0, bool soft=True, int shortlist=0) -> ()",
     KVCACHE_OP(select_tokens)},
    {},
};

}  // namespace kvcache
