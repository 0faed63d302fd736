// append, copy_pages, compact, overwrite, page_bounds: schema, checks and threads. Semantics:
// python/kvcache/ops/reference.py.
#include <algorithm>
#include <vector>

#include "../cpu/kernels.h"
#include "../cuda/kernels.h"
#include "torch_ops.h"

namespace kvcache {
namespace bindings {
namespace {

template <Backend B>
void append(const Tensor& k_pages, const Tensor& v_pages, const Tensor& table, const Tensor& counts,
            const Tensor& positions, const Tensor& columns, const Tensor& k, const Tensor& v,
            const Tensor& new_positions, const OptionalTensor& new_columns, const OptionalTensor& bounds) {
  const Checker check("append", B);
  AppendParams p{};
  PagedView& view = p.view;
  view = check.pages(k_pages, &v_pages, table);
  check.entries(view, counts, positions);
  check.columns(view, columns);
  const Dim rows{"R", view.rows}, heads{"H", view.heads};
  p.k = check.strided4("k", k, {rows, heads, {"T", kAny}, {"Dk", view.k_dim}});
  const Dim tokens{"T", k.size(2)};
  p.v = check.strided4("v", v, {rows, heads, tokens, {"Dv", view.v_dim}});
  p.new_positions = check.int32("new_positions", new_positions, {rows, tokens});
  if (new_columns) {
    p.new_columns = check.float32("new_columns", *new_columns, {{"N", view.n_columns}, rows, heads, tokens});
  }
  if (bounds) p.bounds = check.bounds(view, *bounds);
  p.tokens = int32_t(tokens.size);
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, k_pages);
    return launch.succeed(cuda::append(p, launch.stream()));
  } else {
    std::vector<int32_t> stored(view.rows);
    for (int64_t r = 0; r < view.rows; ++r) {
      const int32_t* line = p.new_positions + r * p.tokens;
      stored[r] = int32_t(std::count_if(line, line + p.tokens, [](int32_t position) { return position >= 0; }));
      for (int64_t h = 0; h < view.heads; ++h) {
        const int64_t item = r * view.heads + h, count = view.counts[item], more = count + stored[r];
        if (more > view.capacity) {
          check.value_error("counts of " + head_name(item, view.heads) + " would be " + std::to_string(more) +
                            ", the table holds C=" + std::to_string(view.capacity) + " entries");
        }
        check.page_ids(view, "table", view.table + item * view.table_width, item, count, more);
      }
    }
    const int64_t items = int64_t(view.rows) * view.heads;
    abi::parallel_for(items, grain(int64_t(p.tokens) * (view.k_dim + view.v_dim)),
                      [&](int64_t begin, int64_t end) { cpu::table().append(p, begin, end); });
    for (int64_t i = 0; i < items; ++i) view.counts[i] += stored[i / view.heads];
  }
}

template <Backend B>
void copy_pages(const Tensor& k_pages, const Tensor& v_pages, const Tensor& source, const Tensor& target,
                const OptionalTensor& bounds) {
  const Checker check("copy_pages", B);
  CopyPagesParams p{};
  p.source = check.int32("source", source, {{"n", kAny}});
  p.n = source.size(0);
  p.target = check.int32("target", target, {{"n", p.n}});
  p.view = check.page_arrays(k_pages, &v_pages);
  if (bounds) p.bounds = check.bounds(p.view, *bounds);
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, k_pages);
    return launch.succeed(cuda::copy_pages(p, launch.stream()));
  } else {
    for (int64_t i = 0; i < p.n; ++i) {
      for (const int32_t page : {p.source[i], p.target[i]}) {
        if (page < 0 || page >= p.view.pages) {
          check.value_error("source or target names page " + std::to_string(page) +
                            ", needs 0 to P-1=" + std::to_string(p.view.pages - 1));
        }
      }
    }
    // The pages are copied in any order, so a target may be neither a source nor named twice.
    std::vector<int32_t> targets(p.target, p.target + p.n);
    std::sort(targets.begin(), targets.end());
    if (auto twice = std::adjacent_find(targets.begin(), targets.end()); twice != targets.end()) {
      check.value_error("target names page " + std::to_string(*twice) + " twice");
    }
    for (int64_t i = 0; i < p.n; ++i) {
      if (std::binary_search(targets.begin(), targets.end(), p.source[i])) {
        check.value_error("page " + std::to_string(p.source[i]) + " is both source and target");
      }
    }
    abi::parallel_for(p.n, grain(int64_t(p.view.page_size) * (p.view.k_dim + p.view.v_dim)),
                      [&](int64_t begin, int64_t end) { cpu::table().copy_pages(p, begin, end); });
  }
}

template <Backend B>
void compact(const Tensor& k_pages, const Tensor& v_pages, const Tensor& source_table, const Tensor& target_table,
             const Tensor& counts, const Tensor& positions, const Tensor& columns, const Tensor& keep,
             const Tensor& keep_counts, const OptionalTensor& bounds) {
  const Checker check("compact", B);
  CompactParams p{};
  PagedView& view = p.view;
  view = check.pages(k_pages, &v_pages, source_table, "source_table");
  check.entries(view, counts, positions);
  check.columns(view, columns);
  const Dim rows{"R", view.rows}, heads{"H", view.heads};
  p.target_table = check.int32("target_table", target_table, {rows, heads, {"M", kAny}});
  p.target_width = int32_t(target_table.size(2));
  p.keep = check.int32("keep", keep, {rows, heads, {"K", kAny}});
  p.keep_width = keep.size(2);
  p.keep_counts = check.int32("keep_counts", keep_counts, {rows, heads});
  if (bounds) p.bounds = check.bounds(view, *bounds);
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, k_pages);
    return launch.succeed(cuda::compact(p, launch.stream()));
  } else {
    const int64_t items = int64_t(view.rows) * view.heads;
    const int64_t room = std::min<int64_t>(p.keep_width, int64_t(p.target_width) * view.page_size);
    for (int64_t i = 0; i < items; ++i) {
      const int64_t n = p.keep_counts[i];
      if (n < 0 || n > room) {
        check.value_error("keep_counts of " + head_name(i, view.heads) + " is " + std::to_string(n) + ", needs 0 to " +
                          std::to_string(room));
      }
      const int32_t* line = p.keep + i * p.keep_width;
      const int32_t* source = view.table + i * view.table_width;
      int64_t before = -1, checked = -1;
      for (int64_t j = 0; j < n; before = line[j++]) {
        if (line[j] <= before || line[j] >= view.counts[i]) {
          check.value_error("keep of " + head_name(i, view.heads) + " holds slot " + std::to_string(line[j]) +
                            " after " + std::to_string(before) + ", needs ascending slots below " +
                            std::to_string(view.counts[i]));
        }
        if (line[j] >= checked) {  // once per page
          check.page_ids(view, "source_table", source, i, line[j], line[j] + 1);
          checked = (line[j] / view.page_size + 1) * int64_t(view.page_size);
        }
      }
      check.page_ids(view, "target_table", p.target_table + i * p.target_width, i, 0, n);
    }
    abi::parallel_for(items, grain(p.keep_width * (view.k_dim + view.v_dim)),
                      [&](int64_t begin, int64_t end) { cpu::table().compact(p, begin, end); });
    std::copy(p.keep_counts, p.keep_counts + items, view.counts);
  }
}

template <Backend B>
void overwrite(const Tensor& k_pages, const Tensor& v_pages, const Tensor& table, const Tensor& counts,
               const Tensor& positions, const Tensor& columns, const Tensor& victims, const OptionalTensor& bounds) {
  const Checker check("overwrite", B);
  OverwriteParams p{};
  PagedView& view = p.view;
  view = check.pages(k_pages, &v_pages, table);
  check.entries(view, counts, positions);
  check.columns(view, columns);
  p.victims = check.int32("victims", victims, {{"R", view.rows}, {"H", view.heads}});
  if (bounds) p.bounds = check.bounds(view, *bounds);
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, k_pages);
    return launch.succeed(cuda::overwrite(p, launch.stream()));
  } else {
    const int64_t items = int64_t(view.rows) * view.heads;
    for (int64_t i = 0; i < items; ++i) {
      const int64_t victim = p.victims[i], count = view.counts[i];
      if (victim < 0) continue;
      if (victim >= count) {
        check.value_error("victims of " + head_name(i, view.heads) + " is slot " + std::to_string(victim) +
                          ", needs a slot below " + std::to_string(count) + " or -1");
      }
      const int32_t* list = view.table + i * view.table_width;
      check.page_ids(view, "table", list, i, victim, victim + 1);
      check.page_ids(view, "table", list, i, count - 1, count);
    }
    abi::parallel_for(items, grain(view.k_dim + view.v_dim),
                      [&](int64_t begin, int64_t end) { cpu::table().overwrite(p, begin, end); });
  }
}

template <Backend B>
void page_bounds(const Tensor& k_pages, const Tensor& table, const Tensor& counts, const Tensor& bounds) {
  const Checker check("page_bounds", B);
  PageBoundsParams p{};
  PagedView& view = p.view;
  view = check.pages(k_pages, nullptr, table);
  check.counts(view, counts);
  p.bounds = check.bounds(view, bounds);
  check.live_pages(view);
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, k_pages);
    launch.succeed(cuda::page_bounds(p, launch.stream()));
  } else {
    abi::parallel_for(int64_t(view.rows) * view.heads, grain(view.capacity * view.k_dim),
                      [&](int64_t begin, int64_t end) { cpu::table().page_bounds(p, begin, end); });
  }
}

}  // namespace
}  // namespace bindings

const Op kStorageOps[] = {
    {"append",
     "append(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor table, Tensor(c!) counts, Tensor(d!) positions, "
     "Tensor(e!) columns, Tensor k, Tensor v, Tensor new_positions, Tensor? new_columns=None, "
     "Tensor(f!)? bounds=None) -> ()",
     KVCACHE_OP(append)},
    {"copy_pages",
     "copy_pages(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor source, Tensor target, Tensor(c!)? bounds=None) -> ()",
     KVCACHE_OP(copy_pages)},
    {"compact",
     "compact(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor source_table, Tensor target_table, Tensor(c!) counts, "
     "Tensor(d!) positions, Tensor(e!) columns, Tensor keep, Tensor keep_counts, "
     "Tensor(f!)? bounds=None) -> ()",
     KVCACHE_OP(compact)},
    {"overwrite",
     "overwrite(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor table, Tensor(c!) counts, Tensor(d!) positions, "
     "Tensor(e!) columns, Tensor victims, Tensor(f!)? bounds=None) -> ()",
     KVCACHE_OP(overwrite)},
    {"page_bounds", "page_bounds(Tensor k_pages, Tensor table, Tensor counts, Tensor(a!) bounds) -> ()",
     KVCACHE_OP(page_bounds)},
    {},
};

}  // namespace kvcache
