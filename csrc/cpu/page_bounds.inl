// page_bounds: smallest and largest key of each page, per channel, and how append keeps them up to date. NaN keys leave
// them alone; a page and channel of nothing but NaN has the bounds inf and -inf.
namespace kvcache::cpu::KVCACHE_ISA_NS {

namespace {  // no two instruction sets may share a symbol

// Element types by their bits, so that a bound is stored as the key it came from.
struct Float32Bits {
  using Bits = uint32_t;
  static constexpr Bits kInfinity = 0x7f800000, kSign = 0x80000000;
  static float wide(Bits x) { return bits_float(x); }
};
struct BFloat16Bits {
  using Bits = uint16_t;
  static constexpr Bits kInfinity = 0x7f80, kSign = 0x8000;
  static float wide(Bits x) { return bf16_to_float(x); }
};
struct Float16Bits {
  using Bits = uint16_t;
  static constexpr Bits kInfinity = 0x7c00, kSign = 0x8000;
  static float wide(Bits x) { return fp16_to_float(x); }
};

}  // namespace

template <class Type>
static inline void widen_typed(typename Type::Bits* __restrict bounds, const typename Type::Bits* __restrict key,
                               int64_t dim, bool fresh) {
  typename Type::Bits* low = bounds;         // [dim]
  typename Type::Bits* high = bounds + dim;  // [dim]
  for (int64_t i = 0; fresh && i < dim; ++i) {
    low[i] = Type::kInfinity;
    high[i] = Type::kInfinity | Type::kSign;
  }
  for (int64_t i = 0; i < dim; ++i) {
    const float x = Type::wide(key[i]);
    low[i] = x < Type::wide(low[i]) ? key[i] : low[i];
    high[i] = x > Type::wide(high[i]) ? key[i] : high[i];
  }
}

// bounds [2, dim] of a page include `key` [dim] from now on; fresh: and nothing else.
static inline void widen(void* bounds, const void* key, DType dtype, int64_t dim, bool fresh) {
  auto* bounds16 = static_cast<uint16_t*>(bounds);
  auto* key16 = static_cast<const uint16_t*>(key);
  switch (dtype) {
    case DType::kFloat32:
      widen_typed<Float32Bits>(static_cast<uint32_t*>(bounds), static_cast<const uint32_t*>(key), dim, fresh);
      break;
    case DType::kBFloat16:
      widen_typed<BFloat16Bits>(bounds16, key16, dim, fresh);
      break;
    case DType::kFloat16:
      widen_typed<Float16Bits>(bounds16, key16, dim, fresh);
      break;
  }
}

static inline char* bounds_of(void* bounds, const PagedView& view, int32_t page) {
  return static_cast<char*>(bounds) + int64_t(page) * 2 * view.k_dim * element_size(view.dtype);
}

// Bounds of the page in `column` of a head that holds `count` entries, from its keys; as they are if none is in it.
static inline void bound_page(void* bounds, const PagedView& view, const int32_t* table, int64_t column,
                              int64_t count) {
  const int64_t size = view.page_size, live = count - column * size < size ? count - column * size : size;
  for (int64_t i = 0; i < live; ++i) {
    widen(bounds_of(bounds, view, table[column]), entry(view.k_pages, view.dtype, size, view.k_dim, table[column], i),
          view.dtype, view.k_dim, i == 0);
  }
}

static void page_bounds(const PageBoundsParams& p, int64_t begin, int64_t end) {
  const PagedView& view = p.view;
  for (int64_t item = begin; item < end; ++item) {
    const int32_t* table = view.table + item * view.table_width;  // [table_width]
    for (int64_t column = 0; column * view.page_size < view.counts[item]; ++column) {
      bound_page(p.bounds, view, table, column, view.counts[item]);
    }
  }
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
