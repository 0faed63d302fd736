// A small vector layer: 16 lanes on AVX-512, 8 on AVX2 + FMA + F16C, 4 anywhere else (SSE2, NEON).
//
// Included once per instruction set, with KVCACHE_ISA_NS naming the copy. Everything sits in an anonymous namespace, so no
// two copies share a weak symbol that the linker could take from the wrong one.
//
// Rows of storage are read in chunks of two vectors. A 16-bit chunk may come in another lane order than in memory
// (`Storage<T>::lane`), which makes a bfloat16 load one shift and one mask; dot products and sums over entries do not
// care, and the few that do (packing q, writing out) use `lane`.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../core/paged_view.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define KVCACHE_SIMD_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define KVCACHE_SIMD_AVX2 1
#endif
#if defined(KVCACHE_SIMD_AVX512) || defined(KVCACHE_SIMD_AVX2)
#pragma GCC diagnostic push  // g++ 12 believes that its own _mm512_undefined_ps is a mistake (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace kvcache::cpu::KVCACHE_ISA_NS {
namespace {

#if defined(KVCACHE_SIMD_AVX512)
constexpr int kLanes = 16;
#elif defined(KVCACHE_SIMD_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kChunk = 2 * kLanes;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t Int __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Uint __attribute__((vector_size(kLanes * 4)));
typedef float VecInMemory __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IntInMemory __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t UintInMemory __attribute__((vector_size(kLanes * 4), aligned(1), may_alias));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

inline Vec splat(float x) {
#if defined(KVCACHE_SIMD_AVX512)
  return _mm512_set1_ps(x);
#elif defined(KVCACHE_SIMD_AVX2)
  return _mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}
inline Int splat_int(int32_t x) { return Int{} + x; }
inline Vec load(const float* p) { return *reinterpret_cast<const VecInMemory*>(p); }
inline Int load_int(const int32_t* p) { return *reinterpret_cast<const IntInMemory*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<VecInMemory*>(p) = x; }

inline Vec load_first(const float* p, int n) {  // the first n of a vector's lanes, zero in the others
  if (n >= kLanes) return load(p);
#if defined(KVCACHE_SIMD_AVX512)
  return _mm512_maskz_loadu_ps(__mmask16((1u << (n > 0 ? n : 0)) - 1), p);
#else
  float lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
#endif
}

// A NaN in x survives both (it is the second operand of maxps), so a bad key shows instead of vanishing.
inline Vec max(Vec bound, Vec x) {
#if defined(KVCACHE_SIMD_AVX512)
  return _mm512_max_ps(bound, x);
#elif defined(KVCACHE_SIMD_AVX2)
  return _mm256_max_ps(bound, x);
#else
  return bound > x ? bound : x;
#endif
}
inline Vec min(Vec bound, Vec x) {
#if defined(KVCACHE_SIMD_AVX512)
  return _mm512_min_ps(bound, x);
#elif defined(KVCACHE_SIMD_AVX2)
  return _mm256_min_ps(bound, x);
#else
  return bound < x ? bound : x;
#endif
}

// a * b + c, opaque: -fassociative-math would regroup a chain of them into products and sums.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(KVCACHE_SIMD_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(KVCACHE_SIMD_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// fma(a, b, sum) where many sums are to stay in registers. As an instruction of its own: otherwise g++ 12 also makes the
// forms that overwrite a factor, with copies to save it, and loads rows long before their use, until sums are spilled.
inline Vec add_product(Vec a, Vec b, Vec sum) {
#if defined(KVCACHE_SIMD_AVX512)
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#elif defined(KVCACHE_SIMD_AVX2)
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
  sum = a * b + sum;
#endif
  return sum;
}

inline float reduce_max(Vec x) {
#if defined(KVCACHE_SIMD_AVX512)
  return _mm512_reduce_max_ps(x);
#else
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
#endif
}
inline float reduce_add(Vec x) {
#if defined(KVCACHE_SIMD_AVX512)
  return _mm512_reduce_add_ps(x);
#else
  float sum = x[0];
  for (int i = 1; i < kLanes; ++i) sum += x[i];
  return sum;
#endif
}

// x where position lies in [lower, upper], -inf elsewhere.
inline Vec where_between(Vec x, Int position, Int lower, Int upper) {
#if defined(KVCACHE_SIMD_AVX512)
  const __mmask16 seen = _mm512_cmple_epi32_mask((__m512i)position, (__m512i)upper) &
                         _mm512_cmple_epi32_mask((__m512i)lower, (__m512i)position);
  return _mm512_mask_blend_ps(seen, _mm512_set1_ps(-kInfinity), x);
#else
  const Int seen = (position <= upper) & (position >= lower);
  return seen ? x : splat(-kInfinity);
#endif
}

// 2^x to 1.6e-7 (degree 5 on [-1/2, 1/2], fitted for relative error with 2^0 exact); 0 from about -127 on, also for -inf.
inline Vec exp2(Vec x) {
#if defined(KVCACHE_SIMD_AVX512)
  x = max(splat(-1000.0f), x);
  const Vec whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = min(splat(128.0f), max(splat(-127.0f), x));
#if defined(KVCACHE_SIMD_AVX2)
  const Int exponent = (Int)_mm256_cvtps_epi32(x);
#else
  const Int exponent = __builtin_convertvector(x + (x < 0.0f ? splat(-0.5f) : splat(0.5f)), Int);
#endif
  const Vec whole = __builtin_convertvector(exponent, Vec);
#endif
  const Vec r = x - whole;
  Vec y = splat(0.0013264723820611835f);
  y = y * r + 0.009671512991189957f;
  y = y * r + 0.05550733581185341f;
  y = y * r + 0.24022242426872253f;
  y = y * r + 0.6931470036506653f;
  y = y * r + 1.0f;
#if defined(KVCACHE_SIMD_AVX512)
  return _mm512_scalef_ps(y, whole);
#else
  return y * (Vec)((exponent + 127) << 23);
#endif
}

// tanh: a Pade quotient near zero, where 1 - 2 / (e^2x + 1) would cancel.
inline Vec tanh(Vec x) {
  const Vec s = x * x;
  const Vec near =
      x * (135135.0f + s * (17325.0f + s * (378.0f + s))) / (135135.0f + s * (62370.0f + s * (3150.0f + s * 28.0f)));
  const Vec far = 1.0f - 2.0f / (exp2(x * (2.0f * kLog2E)) + 1.0f);
  return (s < 1.0f) ? near : far;
}

// Lane i of the result is the sum of the lanes of a[i].
inline Vec transpose_sum(const Vec (&a)[kLanes]) {
#if defined(KVCACHE_SIMD_AVX512)
  __m512 four[4];  // [i]: the partial sums of a[4 i .. 4 i + 3], once per 128-bit lane
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 x =
        _mm512_add_ps(_mm512_unpacklo_ps(a[4 * i], a[4 * i + 1]), _mm512_unpackhi_ps(a[4 * i], a[4 * i + 1]));
    const __m512 y =
        _mm512_add_ps(_mm512_unpacklo_ps(a[4 * i + 2], a[4 * i + 3]), _mm512_unpackhi_ps(a[4 * i + 2], a[4 * i + 3]));
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))),
                            _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))));
  }
  const __m512 x =
      _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88), _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
  const __m512 y =
      _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x88), _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
#elif defined(KVCACHE_SIMD_AVX2)
  // Blends run where shuffles cannot, so halves are swapped on one side only: half the shuffles of three rounds of hadd.
  __m256 two[4];  // [i]: four partial sums of a[i], then of a[i + 4]
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    two[i] = _mm256_add_ps(_mm256_blend_ps(a[i], a[i + 4], 0xf0), _mm256_permute2f128_ps(a[i], a[i + 4], 0x21));
  __m256 four[2];  // [i]: two partial sums of each of a[2 i], a[2 i + 1], a[2 i + 4], a[2 i + 5]
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    four[i] = _mm256_add_ps(_mm256_blend_ps(two[2 * i], two[2 * i + 1], 0xcc),
                            _mm256_shuffle_ps(two[2 * i], two[2 * i + 1], 0x4e));
  return _mm256_hadd_ps(four[0], four[1]);
#else
  const Vec x = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5) + __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7);
  const Vec y = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5) + __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
  return __builtin_shufflevector(x, y, 0, 1, 4, 5) + __builtin_shufflevector(x, y, 2, 3, 6, 7);
#endif
}

// --- storage types -------------------------------------------------------------------------------------------------

inline Uint load_halves(const void* p) { return *static_cast<const UintInMemory*>(p); }  // kChunk 16-bit elements
inline Uint load_first_halves(const uint16_t* p, int n) {  // the first n of them, then zeros
#if defined(KVCACHE_SIMD_AVX512)
  return (Uint)_mm512_maskz_loadu_epi16(__mmask32((1ull << n) - 1), p);
#else
  uint16_t lanes[kChunk] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load_halves(lanes);
#endif
}
constexpr int paired_lane(int i) { return (i & 1) * kLanes + (i >> 1); }  // even elements first, then the odd ones

template <class T>
struct Storage;

template <>
struct Storage<float> {
  static constexpr int lane(int i) { return i; }
  static inline void load_chunk(const float* p, Vec& a, Vec& b) { a = load(p), b = load(p + kLanes); }
  static inline void load_first(const float* p, int n, Vec& a, Vec& b) {
    a = KVCACHE_ISA_NS::load_first(p, n);
    b = n > kLanes ? KVCACHE_ISA_NS::load_first(p + kLanes, n - kLanes) : Vec{};
  }
};

template <>
struct Storage<BFloat16> {
  static constexpr int lane(int i) { return paired_lane(i); }
  static inline void widen(Uint x, Vec& a, Vec& b) { a = (Vec)(x << 16), b = (Vec)(x & 0xffff0000u); }
  static inline void load_chunk(const BFloat16* p, Vec& a, Vec& b) { widen(load_halves(p), a, b); }
  static inline void load_first(const BFloat16* p, int n, Vec& a, Vec& b) {
    widen(load_first_halves(&p->bits, n), a, b);
  }
};

template <>
struct Storage<Float16> {
#if defined(KVCACHE_SIMD_AVX512) || defined(KVCACHE_SIMD_AVX2)
  static constexpr int lane(int i) { return i; }
  // The conversions read memory themselves: no vector has to be taken apart.
  static inline void load_chunk(const Float16* p, Vec& a, Vec& b) {
#if defined(KVCACHE_SIMD_AVX512)
    a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
    b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + kLanes)));
#else
    a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
    b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + kLanes)));
#endif
  }
  static inline void load_first(const Float16* p, int n, Vec& a, Vec& b) {
    const Uint x = load_first_halves(&p->bits, n);
    load_chunk(reinterpret_cast<const Float16*>(&x), a, b);
  }
#else
  static constexpr int lane(int i) { return paired_lane(i); }
  // Bits of a half in the low 16 of each lane. The multiplication moves the exponent's bias and also heals denormals.
  static inline Vec widen_half(Uint h) {
    const Uint magnitude = (Uint)((Vec)((h & 0x7fffu) << 13) * 0x1p112f);
    const Uint special = (Uint)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return (Vec)(magnitude | special | ((h & 0x8000u) << 16));
  }
  static inline void widen(Uint x, Vec& a, Vec& b) { a = widen_half(x & 0xffffu), b = widen_half(x >> 16); }
  static inline void load_chunk(const Float16* p, Vec& a, Vec& b) { widen(load_halves(p), a, b); }
  static inline void load_first(const Float16* p, int n, Vec& a, Vec& b) {
    widen(load_first_halves(&p->bits, n), a, b);
  }
#endif
};

inline const char* element(const void* data, DType dtype, int64_t i) {
  return static_cast<const char*>(data) + i * (dtype == DType::kFloat32 ? 4 : 2);
}

// --- the rest --------------------------------------------------------------------------------------------------------

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Working memory of one call: grows never, frees itself. (No std::vector: its members would be weak symbols.)
struct Arena {
  char* base;
  int64_t used = 0, size;
  explicit Arena(int64_t bytes) : size(round_up(bytes, 4096)) {
    base = static_cast<char*>(aligned_alloc(4096, size_t(size > 0 ? size : 4096)));
    if (!base) abort();
  }
  ~Arena() { free(base); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  float* floats(int64_t n) {  // on a cache line of its own, with one line of slack behind
    char* p = base + used;
    used += bytes_of(n);
    return reinterpret_cast<float*>(p);
  }
  static int64_t bytes_of(int64_t n) { return round_up(n * 4, 64) + 64; }
};

}  // namespace
}  // namespace kvcache::cpu::KVCACHE_ISA_NS
