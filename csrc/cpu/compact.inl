// compact: the kept slots move to the front, in order. In place this is safe because slot i is written after slot
// keep[i] >= i was read. Neighbours that stay neighbours move as one block.
namespace kvcache::cpu::KVCACHE_ISA_NS {

static void compact(const CompactParams& p, int64_t begin, int64_t end) {
  const PagedView& view = p.view;
  const int64_t size = view.page_size;
  const int64_t column_step = int64_t(view.rows) * view.heads;
  for (int64_t item = begin; item < end; ++item) {
    const int32_t* keep = p.keep + item * p.keep_width;              // [keep_width]
    const int32_t* source = view.table + item * view.table_width;    // [table_width]
    const int32_t* target = p.target_table + item * p.target_width;  // [target_width]
    const int64_t n = p.keep_counts[item];
    for (int64_t i = 0; i < n;) {
      const int64_t old = keep[i];
      const int64_t room = size - (old % size > i % size ? old % size : i % size);
      int64_t run = 1;
      while (run < room && i + run < n && keep[i + run] == old + run) ++run;
      const int32_t from = source[old / size], to = target[i / size];
      if (from != to || old != i) {
        memmove(entry(view.k_pages, view.dtype, size, view.k_dim, to, i % size),
                entry(view.k_pages, view.dtype, size, view.k_dim, from, old % size),
                run * view.k_dim * element_size(view.dtype));
        memmove(entry(view.v_pages, view.dtype, size, view.v_dim, to, i % size),
                entry(view.v_pages, view.dtype, size, view.v_dim, from, old % size),
                run * view.v_dim * element_size(view.dtype));
      }
      i += run;
    }
    if (p.bounds) {
      for (int64_t column = 0; column * size < n; ++column) bound_page(p.bounds, view, target, column, n);
    }
    int32_t* positions = view.positions + item * view.capacity;  // [capacity]
    for (int64_t i = 0; i < n; ++i) positions[i] = positions[keep[i]];
    for (int64_t c = 0; c < view.n_columns; ++c) {
      float* column = view.columns + (c * column_step + item) * view.capacity;  // [capacity]
      for (int64_t i = 0; i < n; ++i) column[i] = column[keep[i]];
    }
  }
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
