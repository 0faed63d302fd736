// overwrite: the last entry moves into the victim's slot. O(1) per head.
namespace kvcache::cpu::KVCACHE_ISA_NS {

static void overwrite(const OverwriteParams& p, int64_t begin, int64_t end) {
  const PagedView& view = p.view;
  const int32_t size = view.page_size;
  const int64_t column_step = int64_t(view.rows) * view.heads;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t victim = p.victims[item], last = int64_t(view.counts[item]) - 1;
    if (victim < 0) continue;
    view.counts[item] = int32_t(last);
    const int32_t* table = view.table + item * view.table_width;  // [table_width]
    if (victim == last) {
      if (p.bounds) bound_page(p.bounds, view, table, last / size, last);
      continue;
    }
    const int32_t from = table[last / size], to = table[victim / size];
    memcpy(entry(view.k_pages, view.dtype, size, view.k_dim, to, victim % size),
           entry(view.k_pages, view.dtype, size, view.k_dim, from, last % size), view.k_dim * element_size(view.dtype));
    memcpy(entry(view.v_pages, view.dtype, size, view.v_dim, to, victim % size),
           entry(view.v_pages, view.dtype, size, view.v_dim, from, last % size), view.v_dim * element_size(view.dtype));
    int32_t* positions = view.positions + item * view.capacity;  // [capacity]
    positions[victim] = positions[last];
    for (int64_t c = 0; c < view.n_columns; ++c) {
      float* column = view.columns + (c * column_step + item) * view.capacity;  // [capacity]
      column[victim] = column[last];
    }
    if (p.bounds) {
      bound_page(p.bounds, view, table, victim / size, last);
      if (last / size != victim / size) bound_page(p.bounds, view, table, last / size, last);
    }
  }
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
