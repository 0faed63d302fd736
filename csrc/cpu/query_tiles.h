// Small matrix products for prefill attention and column sums. One side of a product has its rows spread over the lanes
// ("panel": [depth, lanes]), the other stays row by row and is broadcast ("rows": [n, kRowStep]), so no result ever has to
// be transposed. Needs convert.inl before it.
#pragma once
#include "simd.h"

namespace kvcache::cpu::KVCACHE_ISA_NS {
namespace {

// A block of kRows x kVecs accumulators fills the register file: 24 of 32 with AVX-512, 12 of 16 with AVX2, 8 of 16 else.
constexpr int kRows = kLanes == 16 ? 8 : 4;
constexpr int kVecs = kLanes == 4 ? 2 : 3;
constexpr int kPanel = kVecs * kLanes;  // lanes of a full panel
constexpr int kRowStep = 272;  // floats between rows: a constant, so that addresses need one register, and an odd
                               // number of cache lines, so that a column of a tile uses all sets of the cache

// result[i][j] = start[i][j] * factor[j] + sum over the depth of rows[i][d] * panel[d][j]; lines of V vectors. A null `start`
// is zero. Row i is at rows + i * row_step, its depth advances by depth_step.
template <int V>
inline void multiply(const float* rows, int64_t row_step, int64_t depth_step, const float* panel, int depth,
                     const float* start, const Vec (&factor)[V], float* result) {
  Vec sums[kRows][V];  // only constant indices, or it would live in memory
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sums[i][j] = start ? load(start + (i * V + j) * kLanes) * factor[j] : Vec{};
  for (int d = 0; d < depth; ++d) {
    Vec line[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) line[j] = load(panel + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec x = splat(rows[i * row_step]);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[i][j] = fma(x, line[j], sums[i][j]);
    }
    rows += depth_step;
    panel += V * kLanes;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) store(result + (i * V + j) * kLanes, sums[i][j]);
}

// One row of storage as float32 in plain order.
template <class T>
inline void widen_row(const char* source, DType dtype, int dim, float* target) {
  if constexpr (Storage<T>::lane(1) == 1) {  // convert_row knows no hardware half conversion
    const T* p = reinterpret_cast<const T*>(source);
    Vec a, b;
    int i = 0;
    for (; i + kChunk <= dim; i += kChunk) {
      Storage<T>::load_chunk(p + i, a, b);
      store(target + i, a), store(target + i + kLanes, b);
    }
    if (i < dim) {  // rows of a tile have room for a whole chunk
      Storage<T>::load_first(p + i, dim - i, a, b);
      store(target + i, a), store(target + i + kLanes, b);
    }
  } else {
    convert_row(target, DType::kFloat32, source, dtype, dim);
  }
}

// panel[d][lane] = row[d] * factor
inline void fill_lane(const float* row, int dim, float factor, int lanes, int lane, float* panel) {
  for (int d = 0; d < dim; ++d) panel[d * lanes + lane] = row[d] * factor;
}

struct Range {
  int32_t low = INT32_MAX, high = INT32_MIN;  // empty
  void add(int32_t x) { low = x < low ? x : low, high = x > high ? x : high; }
  void add(const int32_t* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) add(x[i]);
  }
};

}  // namespace
}  // namespace kvcache::cpu::KVCACHE_ISA_NS
