// topk, choose_victims, query_similarity: schema, checks and threads. Semantics: python/kvcache/ops/reference.py.
#include "../cpu/kernels.h"
#include "../cuda/kernels.h"
#include "torch_ops.h"

namespace kvcache {
namespace bindings {
namespace {

// counts [R, H] of any strides, each within 0 .. C.
void check_counts(const Checker& check, const int32_t* counts, const int64_t (&stride)[2], int64_t rows, int64_t heads,
                  int64_t capacity) {
  for (int64_t i = 0; i < rows * heads; ++i) {
    const int32_t count = counts[i / heads * stride[0] + i % heads * stride[1]];
    if (count < 0 || count > capacity) {
      check.value_error("counts of " + head_name(i, heads) + " is " + std::to_string(count) +
                        ", needs 0 to C=" + std::to_string(capacity));
    }
  }
}

// pages [R, H, W] of any strides: columns of the table, page_counts of them.
void check_listed_pages(const Checker& check, const TopKParams& p) {
  const int64_t columns = (p.capacity + p.page_size - 1) / p.page_size;
  for (int64_t i = 0; i < int64_t(p.rows) * p.heads; ++i) {
    const int64_t row = i / p.heads, head = i % p.heads;
    const int64_t n = p.page_counts[row * p.page_counts_stride[0] + head * p.page_counts_stride[1]];
    if (n < 0 || n > p.page_width) {
      check.value_error("page_counts of " + head_name(i, p.heads) + " is " + std::to_string(n) +
                        ", needs 0 to W=" + std::to_string(p.page_width));
    }
    const int32_t* pages = p.pages + row * p.pages_stride[0] + head * p.pages_stride[1];
    for (int64_t j = 0; j < n; ++j) {
      if (pages[j] < 0 || pages[j] >= columns || (j > 0 && pages[j] <= pages[j - 1])) {
        check.value_error("pages of " + head_name(i, p.heads) + " lists " + std::to_string(pages[j]) +
                          ", needs ascending columns below " + std::to_string(columns));
      }
    }
  }
}

template <Backend B>
std::tuple<Tensor, Tensor> topk(const Tensor& scores, const Tensor& counts, const Tensor& positions, const Tensor& k,
                                const Tensor& first, const Tensor& end, int64_t width, const OptionalTensor& pages,
                                const OptionalTensor& page_counts, int64_t page_size) {
  const Checker check("topk", B);
  TopKParams p{};
  p.scores = check.strided_float32("scores", scores, {{"R", kAny}, {"H", kAny}, {"C", kAny}}, p.scores_stride);
  const Dim rows{"R", scores.size(0)}, heads{"H", scores.size(1)};
  if (pages.has_value() != page_counts.has_value()) check.value_error("pages and page_counts need each other");
  if (pages) {
    if (page_size < 1) check.value_error("page_size is " + std::to_string(page_size) + ", needs 1 or more with pages");
    p.pages = check.strided_int32("pages", *pages, {rows, heads, {"W", kAny}}, p.pages_stride);
    p.page_counts = check.strided_int32("page_counts", *page_counts, {rows, heads}, p.page_counts_stride);
    p.page_width = pages->size(2);
    p.page_size = int32_t(page_size);
    check.shape("scores", scores, {rows, heads, {"W*page_size", p.page_width * page_size}});
  }
  const Dim capacity{"C", pages ? kAny : scores.size(2)};
  p.counts = check.strided_int32("counts", counts, {rows, heads}, p.counts_stride);
  p.positions = check.strided_int32("positions", positions, {rows, heads, capacity}, p.positions_stride);
  p.k = check.strided_int32("k", k, {rows, heads}, p.k_stride);
  p.first = check.int32("first", first, {rows});
  p.end = check.int32("end", end, {rows});
  p.rows = int32_t(rows.size);
  p.heads = int32_t(heads.size);
  p.width = width;
  p.capacity = positions.size(2);
  if (width < 0) check.value_error("width is " + std::to_string(width) + ", needs 0 or more");
  if (B == Backend::kCpu) {
    check_counts(check, p.counts, p.counts_stride, rows.size, heads.size, p.capacity);
    if (pages) check_listed_pages(check, p);
  }
  Tensor index = check.empty(scores, {rows.size, heads.size, width}, counts.dtype());
  Tensor index_counts = check.empty(scores, {rows.size, heads.size}, counts.dtype());
  p.index = index.mutable_data<int32_t>();
  p.index_counts = index_counts.mutable_data<int32_t>();
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, scores);
    const Tensor memory = check.scratch(scores, cuda::topk_scratch(p));
    launch.succeed(cuda::topk(p, memory.mutable_data<void>(), launch.stream()));
  } else {
    const int64_t items = rows.size * heads.size;
    abi::parallel_for(items, grain(8 * scores.size(2)),
                      [&](int64_t begin, int64_t end) { cpu::table().topk(p, begin, end); });
    for (int64_t i = 0; i < items; ++i) {
      if (p.index_counts[i] > width) {
        check.value_error("width=" + std::to_string(width) + " is too small, " + head_name(i, heads.size) + " keeps " +
                          std::to_string(p.index_counts[i]) + " entries");
      }
    }
  }
  return {std::move(index), std::move(index_counts)};
}

template <Backend B>
Tensor choose_victims(const OptionalTensor& scores, const Tensor& counts, const Tensor& positions,
                      const Tensor& budgets, const Tensor& first, const Tensor& end) {
  const Checker check("choose_victims", B);
  VictimParams p{};
  p.positions =
      check.strided_int32("positions", positions, {{"R", kAny}, {"H", kAny}, {"C", kAny}}, p.positions_stride);
  const Dim rows{"R", positions.size(0)}, heads{"H", positions.size(1)}, capacity{"C", positions.size(2)};
  if (scores) p.scores = check.strided_float32("scores", *scores, {rows, heads, capacity}, p.scores_stride);
  p.counts = check.strided_int32("counts", counts, {rows, heads}, p.counts_stride);
  p.budgets = check.strided_int32("budgets", budgets, {rows, heads}, p.budgets_stride);
  p.first = check.int32("first", first, {rows});
  p.end = check.int32("end", end, {rows});
  p.rows = int32_t(rows.size);
  p.heads = int32_t(heads.size);
  p.capacity = capacity.size;
  if (B == Backend::kCpu) check_counts(check, p.counts, p.counts_stride, rows.size, heads.size, capacity.size);
  Tensor victims = check.empty(positions, {rows.size, heads.size}, counts.dtype());
  p.victims = victims.mutable_data<int32_t>();
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, positions);
    const Tensor memory = check.scratch(positions, cuda::choose_victims_scratch(p));
    launch.succeed(cuda::choose_victims(p, memory.mutable_data<void>(), launch.stream()));
  } else {
    abi::parallel_for(rows.size * heads.size, grain(capacity.size),
                      [&](int64_t begin, int64_t end) { cpu::table().choose_victims(p, begin, end); });
  }
  return victims;
}

template <Backend B>
Tensor query_similarity(const Tensor& a, const Tensor& b) {
  const Checker check("query_similarity", B);
  SimilarityParams p{};
  p.a = check.strided4("a", a, {{"R", kAny}, {"Hq", kAny}, {"D", kAny}});
  p.b = check.strided4("b", b, {{"R", a.size(0)}, {"Hq", a.size(1)}, {"D", a.size(2)}});
  p.rows = int32_t(a.size(0));
  p.query_heads = int32_t(a.size(1));
  p.dim = int32_t(a.size(2));
  Tensor out = check.empty(a, {a.size(0)}, abi::aoti_torch_dtype_float32());
  p.out = out.mutable_data<float>();
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, a);
    launch.succeed(cuda::query_similarity(p, launch.stream()));
  } else {
    abi::parallel_for(p.rows, grain(int64_t(p.query_heads) * p.dim),
                      [&](int64_t begin, int64_t end) { cpu::table().query_similarity(p, begin, end); });
  }
  return out;
}

}  // namespace
}  // namespace bindings

const Op kSelectionOps[] = {
    {"topk",
     "topk(Tensor scores, Tensor counts, Tensor positions, Tensor k, Tensor first, Tensor end, int width, "
     "Tensor? pages=None, Tensor? page_counts=None, int page_size=0) -> (Tensor, Tensor)",
     KVCACHE_OP(topk)},
    {"choose_victims",
     "choose_victims(Tensor? scores, Tensor counts, Tensor positions, Tensor budgets, Tensor first, Tensor end) -> Tensor",
     KVCACHE_OP(choose_victims)},
    {"query_similarity", "query_similarity(Tensor a, Tensor b) -> Tensor", KVCACHE_OP(query_similarity)},
    {},
};

}  // namespace kvcache
