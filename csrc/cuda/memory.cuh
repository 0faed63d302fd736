// What the kernels that move entries share: vectors of elements, and on which addresses they may be used.
#pragma once
#include <cstdint>

#include "../core/paged_view.h"
#include "device.cuh"
#include "types.cuh"

namespace kvcache::cuda {

constexpr int kInvalidConfiguration = 9;  // cudaErrorInvalidConfiguration

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// n elements that are loaded and stored at once, in pieces of 16 bytes.
template <class T, int n>
struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Pack {
  T x[n];
};

// n elements in the type that pages have; the same type is copied bit by bit.
template <class T, int n, class From>
__device__ __forceinline__ Pack<T, n> load_as(const From* source) {
  const auto given = *reinterpret_cast<const Pack<From, n>*>(source);
  if constexpr (std::is_same_v<T, From>) {
    return given;
  } else {
    Pack<T, n> result;
#pragma unroll
    for (int i = 0; i < n; ++i) result.x[i] = from_float<T>(to_float(given.x[i]));
    return result;
  }
}

// The largest unit (16, 8, 4 or 2 bytes: all storage types have an even size) that divides all of the numbers: addresses, row lengths, strides.
template <class... Number>
int common_unit(Number... numbers) {
  const uint64_t all = (uint64_t(numbers) | ...) | 16;
  return int(all & (~all + 1));
}
inline int64_t address(const void* pointer) { return int64_t(reinterpret_cast<intptr_t>(pointer)); }
// Its place in a table of kernels {uint16_t, uint32_t, uint2, uint4}.
inline int unit_index(int unit) { return unit == 16 ? 3 : unit == 8 ? 2 : unit == 4 ? 1 : 0; }

// Where entry `slot` of a head lies in a page array of rows of `row_bytes`, given the head's list of pages.
__device__ __forceinline__ int64_t entry_offset(const int32_t* table, int slot, int page_size, int64_t row_bytes) {
  const int column = unsigned(slot) / unsigned(page_size);
  return (int64_t(table[column]) * page_size + (slot - column * page_size)) * row_bytes;
}

}  // namespace kvcache::cuda
