// The first pass of a decode step of TokenSelect: which rows choose anew, and the longer lists of the others. What an
// active row does then are selection scores and topk. Needs query_similarity.inl before it.
#include "../core/selection_cache.h"

namespace kvcache::cpu::KVCACHE_ISA_NS {

// p.plain of one row: its query turned back to position 0, rounded as the query is.
static void turn_back(const SelectTokensParams& p, int64_t row) {
  const int dim = p.view.k_dim, half = p.half;
  const float *cos = p.cos + row * half, *sin = p.sin + row * half;
  float x[256], y[256];
  for (int64_t head = 0; head < p.query_heads; ++head) {
    convert_row(x, DType::kFloat32, element(p.q.data, p.q.dtype, row * p.q.stride[0] + head * p.q.stride[1]), p.q.dtype,
                dim);
    for (int i = 0; i < half; ++i) {
      y[i] = x[i] * cos[i] - x[half + i] * sin[i];
      y[half + i] = x[half + i] * cos[i] + x[i] * sin[i];
    }
    for (int i = 2 * half; i < dim; ++i) y[i] = x[i];
    convert_row(static_cast<char*>(p.plain) + (row * p.query_heads + head) * dim * element_size(p.q.dtype), p.q.dtype,
                y, DType::kFloat32, dim);
  }
}

static void select_begin(const SelectTokensParams& p, int64_t begin, int64_t end) {
  const int64_t dim = p.view.k_dim, line = p.query_heads * dim, most = int64_t(p.sinks) + p.k + p.local;
  const int64_t bytes = element_size(p.q.dtype);
  Strided4 plain = p.q;
  if (p.plain) plain = {p.plain, {line, dim, dim}, p.q.dtype};
  const Strided4 known = {p.query, {line, dim, dim}, p.q.dtype};
  for (int64_t row = begin; row < end; ++row) {
    const int32_t position = p.q_positions[row];
    const SelectionRow now = {position >= 0, p.view.heads > 0 ? p.view.counts[row * p.view.heads] : 0, p.at[row],
                              p.until[row], p.index_counts[row]};
    float similarity = 0;
    if (now.asks && now.held > most) {
      if (p.plain) turn_back(p, row);
      if (now.at > 0) {
        SimilarityParams pair = {plain, known, 1, p.query_heads, p.view.k_dim, &similarity};
        pair.a.data = element(plain.data, plain.dtype, row * plain.stride[0]);
        pair.b.data = element(known.data, known.dtype, row * known.stride[0]);
        query_similarity(pair, 0, 1);
      }
    }
    const SelectionChoice choice = selection_choice(now, most, p.local, p.width, p.reuse, similarity);
    if (choice != kReadsAll) __atomic_fetch_add(p.events + (choice == kSelects ? 0 : 1), 1, __ATOMIC_RELAXED);
    p.active[row] = choice == kSelects;
    p.first[row] = p.sinks;
    p.end[row] = position + 1 - p.local > p.sinks ? position + 1 - p.local : p.sinks;
    if (choice == kSelects) {
      for (int64_t head = 0; head < p.query_heads; ++head) {
        memcpy(static_cast<char*>(p.query) + (row * line + head * dim) * bytes,
               element(plain.data, plain.dtype, row * plain.stride[0] + head * plain.stride[1]), size_t(dim * bytes));
      }
      p.at[row] = p.until[row] = now.held;
    } else {
      const int32_t growth = selection_growth(now, p.width);
      int32_t* list = p.index + row * p.width + now.listed;
      for (int32_t i = 0; i < growth; ++i) list[i] = now.until + i;
      p.index_counts[row] = now.listed + growth;
      p.until[row] = now.until + growth;
    }
  }
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
