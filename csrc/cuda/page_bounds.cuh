// Smallest and largest key of a page in n neighbouring channels, in registers. NaN keys change nothing; nothing but NaN
// leaves inf and -inf.
#pragma once
#include "memory.cuh"

namespace kvcache::cuda {

// Channels of storage T that a Unit of memory holds.
template <class Unit, class T>
constexpr int kVectorOf = sizeof(Unit) < sizeof(T) ? 1 : int(sizeof(Unit) / sizeof(T));

template <class T, int n>
struct ChannelBounds {
  float low[n], high[n];

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i < n; ++i) low[i] = __int_as_float(0x7f800000), high[i] = -low[i];
  }
  // stored [2, dim]: this page's bounds, from these channels on.
  __device__ __forceinline__ void load(const T* stored, int dim) {
    const auto a = load_as<T, n>(stored), b = load_as<T, n>(stored + dim);
#pragma unroll
    for (int i = 0; i < n; ++i) low[i] = to_float(a.x[i]), high[i] = to_float(b.x[i]);
  }
  __device__ __forceinline__ void include(const Pack<T, n>& key) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float x = to_float(key.x[i]);
      low[i] = fminf(low[i], x);
      high[i] = fmaxf(high[i], x);
    }
  }
  // keys [rows, dim] of which `live` >= 1 count, from these channels on; kBatch of them are on their way at once.
  template <int kBatch>
  __device__ __forceinline__ void include_rows(const T* keys, int live, int dim) {
    for (int slot = 0; slot < live; slot += kBatch) {
      Pack<T, n> key[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        // A key too many is the last one again, which changes nothing.
        key[j] = load_as<T, n>(keys + int64_t(min(slot + j, live - 1)) * dim);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) include(key[j]);
    }
  }
  __device__ __forceinline__ void store(T* stored, int dim) const {
    Pack<T, n> a, b;
#pragma unroll
    for (int i = 0; i < n; ++i) a.x[i] = from_float<T>(low[i]), b.x[i] = from_float<T>(high[i]);
    *reinterpret_cast<Pack<T, n>*>(stored) = a;
    *reinterpret_cast<Pack<T, n>*>(stored + dim) = b;
  }
};

}  // namespace kvcache::cuda
