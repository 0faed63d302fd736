// append: new tokens behind the entries of each head. Reads every new element once and writes it once.
namespace kvcache::cpu::KVCACHE_ISA_NS {

static void append(const AppendParams& p, int64_t begin, int64_t end) {
  const PagedView& view = p.view;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / view.heads, head = item % view.heads;
    const int32_t* new_positions = p.new_positions + row * p.tokens;  // [tokens]
    const int32_t* table = view.table + item * view.table_width;      // [table_width]
    int32_t* positions = view.positions + item * view.capacity;       // [capacity]
    const int64_t column_step = int64_t(view.rows) * view.heads;      // items from one side column to the next
    auto* k =
        static_cast<const char*>(p.k.data) + (row * p.k.stride[0] + head * p.k.stride[1]) * element_size(p.k.dtype);
    auto* v =
        static_cast<const char*>(p.v.data) + (row * p.v.stride[0] + head * p.v.stride[1]) * element_size(p.v.dtype);
    const int64_t k_step = p.k.stride[2] * element_size(p.k.dtype), v_step = p.v.stride[2] * element_size(p.v.dtype);
    int64_t slot = view.counts[item];
    for (int64_t t = 0; t < p.tokens; ++t) {
      if (new_positions[t] < 0) continue;
      const int32_t page = table[slot / view.page_size];
      const int64_t inside = slot % view.page_size;
      void* key = entry(view.k_pages, view.dtype, view.page_size, view.k_dim, page, inside);
      convert_row(key, view.dtype, k + t * k_step, p.k.dtype, view.k_dim);
      if (p.bounds) widen(bounds_of(p.bounds, view, page), key, view.dtype, view.k_dim, inside == 0);
      convert_row(entry(view.v_pages, view.dtype, view.page_size, view.v_dim, page, inside), view.dtype, v + t * v_step,
                  p.v.dtype, view.v_dim);
      positions[slot] = new_positions[t];
      for (int64_t n = 0; n < view.n_columns; ++n) {
        const int64_t line = n * column_step + item;
        view.columns[line * view.capacity + slot] = p.new_columns ? p.new_columns[line * p.tokens + t] : 0.0f;
      }
      ++slot;
    }
  }
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
