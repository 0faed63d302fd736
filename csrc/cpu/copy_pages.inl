// copy_pages: whole pages with their bounds, before a shared page is written to.
namespace kvcache::cpu::KVCACHE_ISA_NS {

static void copy_pages(const CopyPagesParams& p, int64_t begin, int64_t end) {
  const PagedView& view = p.view;
  const int64_t k_bytes = int64_t(view.page_size) * view.k_dim * element_size(view.dtype);
  const int64_t v_bytes = int64_t(view.page_size) * view.v_dim * element_size(view.dtype);
  const int64_t bounds_bytes = 2 * int64_t(view.k_dim) * element_size(view.dtype);
  auto* bounds = static_cast<char*>(p.bounds);
  auto* k = static_cast<char*>(view.k_pages);
  auto* v = static_cast<char*>(view.v_pages);
  for (int64_t i = begin; i < end; ++i) {
    memcpy(k + p.target[i] * k_bytes, k + p.source[i] * k_bytes, k_bytes);
    memcpy(v + p.target[i] * v_bytes, v + p.source[i] * v_bytes, v_bytes);
    if (bounds) memcpy(bounds + p.target[i] * bounds_bytes, bounds + p.source[i] * bounds_bytes, bounds_bytes);
  }
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
