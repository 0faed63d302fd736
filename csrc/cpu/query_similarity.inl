// Cosine of two queries over all their heads, as torch.cosine_similarity computes it: both are brought to length 1 before
// they are multiplied, since the products of long vectors would overflow.
namespace kvcache::cpu::KVCACHE_ISA_NS {

static void query_similarity(const SimilarityParams& p, int64_t begin, int64_t end) {
  const int64_t line = round_up(p.dim, kLanes);
  Arena arena(2 * Arena::bytes_of(line));
  float *a = arena.floats(line), *b = arena.floats(line);  // one head, zeros behind its end
  for (int64_t i = p.dim; i < line; ++i) a[i] = b[i] = 0;
  auto load_head = [](const Strided4& x, int64_t row, int64_t head, int64_t dim, float* target) {
    convert_row(target, DType::kFloat32, element(x.data, x.dtype, row * x.stride[0] + head * x.stride[1]), x.dtype,
                dim);
  };
  for (int64_t row = begin; row < end; ++row) {
    Vec a_square = {}, b_square = {};
    for (int64_t head = 0; head < p.query_heads; ++head) {
      load_head(p.a, row, head, p.dim, a);
      load_head(p.b, row, head, p.dim, b);
      for (int64_t i = 0; i < line; i += kLanes) {
        a_square = fma(load(a + i), load(a + i), a_square);
        b_square = fma(load(b + i), load(b + i), b_square);
      }
    }
    const float a_length = sqrtf(reduce_add(a_square)), b_length = sqrtf(reduce_add(b_square));
    const Vec a_factor = splat(a_length < 1e-8f ? 1e-8f : a_length),
              b_factor = splat(b_length < 1e-8f ? 1e-8f : b_length);
    Vec product = {};
    for (int64_t head = 0; head < p.query_heads; ++head) {
      load_head(p.a, row, head, p.dim, a);
      load_head(p.b, row, head, p.dim, b);
      for (int64_t i = 0; i < line; i += kLanes) product += (load(a + i) / a_factor) * (load(b + i) / b_factor);
    }
    p.out[row] = reduce_add(product);
  }
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
