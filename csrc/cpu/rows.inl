// active_rows, gather_rows, scatter_rows: the tokens that a layer really computes, and their way back.
namespace kvcache::cpu::KVCACHE_ISA_NS {

static void active_rows(const ActiveRowsParams& p) {
  int64_t found = 0;
  for (int64_t i = 0; i < p.n; ++i) {
    p.index[found] = int32_t(i);  // overwritten by the next one unless it stays; found <= i
    found += p.mask[i];
  }
  for (int64_t i = found; i < p.n; ++i) p.index[i] = -1;
  *p.count = int32_t(found);
}

static void gather_rows(const RowsParams& p, int64_t begin, int64_t end) {
  auto* x = static_cast<const char*>(p.x);
  auto* picked = static_cast<char*>(p.picked);
  for (int64_t i = begin; i < end; ++i) {
    if (p.index[i] < 0) {
      memset(picked + i * p.row_bytes, 0, p.row_bytes);
    } else {
      memcpy(picked + i * p.row_bytes, x + p.index[i] * p.row_bytes, p.row_bytes);
    }
  }
}

static void scatter_rows(const RowsParams& p, int64_t begin, int64_t end) {
  auto* x = static_cast<char*>(p.x);
  auto* picked = static_cast<const char*>(p.picked);
  for (int64_t i = begin; i < end; ++i) {
    if (p.index[i] >= 0) memcpy(x + p.index[i] * p.row_bytes, picked + i * p.row_bytes, p.row_bytes);
  }
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
