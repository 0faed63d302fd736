// Element types of pages and tensors: widening, rounding to nearest even, and rows from one type to another.
// Integer arithmetic only, so that every instruction set gives the same bits and the loops vectorise without F16C.
namespace kvcache::cpu::KVCACHE_ISA_NS {

static inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static inline float bf16_to_float(uint16_t x) { return bits_float(uint32_t(x) << 16); }

static inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);  // adding could carry a NaN into infinity
}

static inline float fp16_to_float(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16;
  const uint32_t magnitude = uint32_t(x & 0x7fff) << 13;
  const uint32_t exponent = magnitude & 0x0f800000;
  // 112 = 127 - 15, the difference of the exponents' biases; infinity and NaN need it twice.
  const uint32_t normal = magnitude + (112u << 23) + (exponent == 0x0f800000 ? 112u << 23 : 0);
  // A subnormal is mantissa * 2^-24: build 2^-14 + that as a normal number and take 2^-14 away.
  const uint32_t subnormal = float_bits(bits_float(magnitude + (113u << 23)) - bits_float(113u << 23));
  return bits_float(sign | (exponent == 0 ? subnormal : normal));
}

static inline uint16_t float_to_fp16(float x) {
  const uint32_t bits = float_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Below 2^-14 the result is subnormal: adding 0.5 leaves the rounded mantissa in the low bits.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  return uint16_t(sign | (magnitude >= 0x47800000 ? special : finite));  // 2^16 and above, infinity, NaN
}

static inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// target[n] = source[n] in the target's type.
static inline void convert_row(void* __restrict target, DType to, const void* __restrict source, DType from,
                               int64_t n) {
  if (to == from) {
    memcpy(target, source, n * element_size(to));
    return;
  }
  auto* narrow_target = static_cast<uint16_t*>(target);
  auto* narrow_source = static_cast<const uint16_t*>(source);
  auto* wide_target = static_cast<float*>(target);
  auto* wide_source = static_cast<const float*>(source);
  if (from == DType::kFloat32) {
    if (to == DType::kBFloat16) {
      for (int64_t i = 0; i < n; ++i) narrow_target[i] = float_to_bf16(wide_source[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) narrow_target[i] = float_to_fp16(wide_source[i]);
    }
  } else if (to == DType::kFloat32) {
    if (from == DType::kBFloat16) {
      for (int64_t i = 0; i < n; ++i) wide_target[i] = bf16_to_float(narrow_source[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) wide_target[i] = fp16_to_float(narrow_source[i]);
    }
  } else if (from == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) narrow_target[i] = float_to_fp16(bf16_to_float(narrow_source[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) narrow_target[i] = float_to_bf16(fp16_to_float(narrow_source[i]));
  }
}

// Address of an entry in a page array of row length `dim`.
static inline char* entry(void* pages, DType dtype, int32_t page_size, int32_t dim, int32_t page,
                          int64_t slot_in_page) {
  return static_cast<char*>(pages) + (int64_t(page) * page_size + slot_in_page) * dim * element_size(dtype);
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
