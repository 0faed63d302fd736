// topk, choose_victims: schema, checks and threads. Semantics: python/kvcache/ops/reference.py.
#include "../cpu/kernels.h"
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

std::tuple<Tensor, Tensor> topk(const Tensor& scores, const Tensor& counts, const Tensor& positions, const Tensor& k,
                                const Tensor& first, const Tensor& end, int64_t width) {
  const Checker check("topk");
  TopKParams p{};
  p.scores = check.strided_float32("scores", scores, {{"R", kAny}, {"H", kAny}, {"C", kAny}}, p.scores_stride);
  const Dim rows{"R", scores.size(0)}, heads{"H", scores.size(1)}, capacity{"C", scores.size(2)};
  p.counts = check.strided_int32("counts", counts, {rows, heads}, p.counts_stride);
  p.positions = check.strided_int32("positions", positions, {rows, heads, capacity}, p.positions_stride);
  p.k = check.strided_int32("k", k, {rows, heads}, p.k_stride);
  p.first = check.int32("first", first, {rows});
  p.end = check.int32("end", end, {rows});
  p.rows = int32_t(rows.size);
  p.heads = int32_t(heads.size);
  p.width = width;
  if (width < 0) check.value_error("width is " + std::to_string(width) + ", needs 0 or more");
  check_counts(check, p.counts, p.counts_stride, rows.size, heads.size, capacity.size);
  Tensor index = abi::empty(scores, {rows.size, heads.size, width}, counts.dtype());
  Tensor index_counts = abi::empty(scores, {rows.size, heads.size}, counts.dtype());
  p.index = index.mutable_data<int32_t>();
  p.index_counts = index_counts.mutable_data<int32_t>();
  const int64_t items = rows.size * heads.size;
  abi::parallel_for(items, grain(8 * capacity.size),
                    [&](int64_t begin, int64_t end) { cpu::table().topk(p, begin, end); });
  for (int64_t i = 0; i < items; ++i) {
    if (p.index_counts[i] > width) {
      check.value_error("width=" + std::to_string(width) + " is too small, " + head_name(i, heads.size) + " keeps " +
                        std::to_string(p.index_counts[i]) + " entries");
    }
  }
  return {std::move(index), std::move(index_counts)};
}

Tensor choose_victims(const OptionalTensor& scores, const Tensor& counts, const Tensor& positions,
                      const Tensor& budgets, const Tensor& first, const Tensor& end) {
  const Checker check("choose_victims");
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
  check_counts(check, p.counts, p.counts_stride, rows.size, heads.size, capacity.size);
  Tensor victims = abi::empty(positions, {rows.size, heads.size}, counts.dtype());
  p.victims = victims.mutable_data<int32_t>();
  abi::parallel_for(rows.size * heads.size, grain(capacity.size),
                    [&](int64_t begin, int64_t end) { cpu::table().choose_victims(p, begin, end); });
  return victims;
}

}  // namespace
}  // namespace bindings

const Op kSelectionOps[] = {
    {"topk",
     "topk(Tensor scores, Tensor counts, Tensor positions, Tensor k, Tensor first, Tensor end, int width) "
     "-> (Tensor, Tensor)",
     abi::Box<bindings::topk>::call},
    {"choose_victims",
     "choose_victims(Tensor? scores, Tensor counts, Tensor positions, Tensor budgets, Tensor first, Tensor end) -> Tensor",
     abi::Box<bindings::choose_victims>::call},
    {},
};

}  // namespace kvcache
