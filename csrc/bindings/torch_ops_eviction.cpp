// evict: schema, checks and threads. Semantics: python/kvcache/ops/reference.py.
#include <algorithm>
#include <vector>

#include "../cpu/kernels.h"
#include "../cuda/kernels.h"
#include "torch_ops.h"

namespace kvcache {
namespace bindings {
namespace {

// Calls run(layer, begin, end) for the parts of [begin, end) that fall into each layer's items; first [layers + 1] is the
// number of each layer's first item.
template <class Run>
void in_each_layer(const std::vector<int64_t>& first, int64_t begin, int64_t end, const Run& run) {
  size_t layer = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
  for (; begin < end; ++layer) {
    const int64_t until = std::min(end, first[layer + 1]);
    if (begin < until) run(layer, begin - first[layer], until - first[layer]);
    begin = until;
  }
}

// The heads of all layers are the items that the threads share.
void evict_on_cpu(Checker& check, std::vector<VictimParams>& choice, std::vector<OverwriteParams>& move) {
  const size_t layers = choice.size();
  std::vector<int64_t> first(layers + 1, 0);
  int64_t entries = 0;
  for (size_t layer = 0; layer < layers; ++layer) {
    const int64_t items = int64_t(choice[layer].rows) * choice[layer].heads;
    first[layer + 1] = first[layer] + items;
    entries += items * choice[layer].capacity;
  }
  const int64_t items = first[layers];
  if (items == 0) return;
  std::vector<int32_t> victims(items);
  for (size_t layer = 0; layer < layers; ++layer) {
    choice[layer].victims = victims.data() + first[layer];
    move[layer].victims = choice[layer].victims;
  }
  abi::parallel_for(items, grain(entries / items), [&](int64_t begin, int64_t end) {
    in_each_layer(first, begin, end, [&](size_t layer, int64_t from, int64_t to) {
      cpu::table().choose_victims(choice[layer], from, to);
    });
  });
  for (size_t layer = 0; layer < layers; ++layer) {
    const PagedView& view = move[layer].view;
    check.in_layer(int64_t(layer));
    for (int64_t i = 0; i < first[layer + 1] - first[layer]; ++i) {
      const int64_t victim = move[layer].victims[i], count = view.counts[i];
      if (victim < 0) continue;
      const int32_t* list = view.table + i * view.table_width;
      check.page_ids(view, "table", list, i, victim, victim + 1);
      check.page_ids(view, "table", list, i, count - 1, count);
    }
  }
  abi::parallel_for(items, grain(move[0].view.k_dim + move[0].view.v_dim), [&](int64_t begin, int64_t end) {
    in_each_layer(first, begin, end,
                  [&](size_t layer, int64_t from, int64_t to) { cpu::table().overwrite(move[layer], from, to); });
  });
}

template <Backend B>
void evict(const Tensor& k_pages, const Tensor& v_pages, const TensorList& table, const TensorList& counts,
           const TensorList& positions, const TensorList& columns, const OptionalTensorList& scores,
           const TensorList& budgets, const TensorList& first, const TensorList& end, const OptionalTensor& bounds) {
  Checker check("evict", B);
  const PagedView pages = check.page_arrays(k_pages, &v_pages);
  void* const bounds_data = bounds ? check.bounds(pages, *bounds) : nullptr;
  const size_t layers = table.size();
  auto same_length = [&](const char* argument, size_t length) {
    if (length != layers) {
      check.value_error(std::string(argument) + " lists " + std::to_string(length) + " layers, needs " +
                        std::to_string(layers) + " as table does");
    }
  };
  same_length("counts", counts.size());
  same_length("positions", positions.size());
  same_length("columns", columns.size());
  if (!scores.empty()) same_length("scores", scores.size());
  same_length("budgets", budgets.size());
  same_length("first", first.size());
  same_length("end", end.size());
  if (layers == 0) return;

  std::vector<VictimParams> choice(layers);
  std::vector<OverwriteParams> move(layers);
  for (size_t layer = 0; layer < layers; ++layer) {
    check.in_layer(int64_t(layer));
    PagedView& view = move[layer].view;
    view = pages;
    check.table(view, "table", table[layer]);
    view.capacity = int64_t(view.table_width) * view.page_size;
    check.entries(view, counts[layer], positions[layer]);
    check.columns(view, columns[layer]);
    move[layer].bounds = bounds_data;
    const PagedView& of_first = move[0].view;
    auto as_first = [&](const char* argument, const char* what, int64_t got, int64_t want) {
      if (got != want) {
        check.value_error(std::string(argument) + " has " + what + "=" + std::to_string(got) + ", needs " + what + "=" +
                          std::to_string(want) + " as layer 0 has");
      }
    };
    as_first("table", "R", view.rows, of_first.rows);
    as_first("columns", "N", view.n_columns, of_first.n_columns);

    VictimParams& p = choice[layer];
    const Dim rows{"R", view.rows}, heads{"H", view.heads}, capacity{"C", view.capacity};
    if (!scores.empty() && scores[layer]) {
      p.scores = check.strided_float32("scores", *scores[layer], {rows, heads, capacity}, p.scores_stride);
    }
    p.budgets = check.strided_int32("budgets", budgets[layer], {rows, heads}, p.budgets_stride);
    p.first = check.int32("first", first[layer], {rows});
    p.end = check.int32("end", end[layer], {rows});
    p.counts = view.counts;
    p.counts_stride[0] = view.heads, p.counts_stride[1] = 1;
    p.positions = view.positions;
    p.positions_stride[0] = view.heads * view.capacity, p.positions_stride[1] = view.capacity;
    p.rows = view.rows;
    p.heads = view.heads;
    p.capacity = view.capacity;
  }
  if constexpr (B == Backend::kCuda) {
    check.in_layer(-1);
    const EvictParams p{choice.data(), move.data(), int32_t(layers)};
    const Launch launch(check, k_pages);
    const Tensor memory = check.scratch(k_pages, cuda::evict_scratch(p));
    launch.succeed(cuda::evict(p, memory.mutable_data<void>(), launch.stream()));
  } else {
    evict_on_cpu(check, choice, move);
  }
}

}  // namespace
}  // namespace bindings

const Op kEvictionOps[] = {
    {"evict",
     "evict(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor[] table, Tensor(c!)[] counts, Tensor(d!)[] positions, "
     "Tensor(e!)[] columns, Tensor?[] scores, Tensor[] budgets, Tensor[] first, Tensor[] end, "
     "Tensor(f!)? bounds=None) -> ()",
     KVCACHE_OP(evict)},
    {},
};

}  // namespace kvcache
