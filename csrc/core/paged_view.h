// Plain views of one layer's paged storage. No torch, no CUDA: shared by the CPU and the CUDA kernels.
#pragma once
#include <cstdint>

namespace kvcache {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A pool's storage and one layer's tables. Offsets into pages are 64-bit: pools exceed 2^31 elements.
struct PagedView {
  void* k_pages;         // [pages, page_size, k_dim]
  void* v_pages;         // [pages, page_size, v_dim]; null where an op reads keys only
  const int32_t* table;  // [rows, heads, table_width] page ids; -1 where unused
  int32_t* counts;       // [rows, heads]
  int32_t* positions;    // [rows, heads, capacity], capacity = table_width * page_size
  float* columns;        // [n_columns, rows, heads, capacity]; column 0 is the score
  DType dtype;           // of both page arrays
  int64_t pages;
  int32_t page_size, k_dim, v_dim;
  int32_t rows, heads, table_width, n_columns;
  int64_t capacity;
};

// A tensor whose innermost dimension is contiguous; the others may have any stride (in elements).
struct Strided4 {
  const void* data;
  int64_t stride[3];  // of dimensions 0, 1, 2
  DType dtype;
};

}  // namespace kvcache
