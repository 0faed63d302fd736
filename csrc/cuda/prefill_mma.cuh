// Tiles of 16-bit values in shared memory for the tensor cores: how they are laid out, filled and multiplied.
#pragma once
#include "device.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "types.cuh"

namespace kvcache::cuda {

// Softcap of a logit, in base 2: tanh(x) = 1 - 2 / (e^2x + 1), to about 1e-7. to_cap = 2 log2(e) scale / softcap and
// from_cap = softcap log2(e).
__device__ __forceinline__ float capped(float product, float to_cap, float from_cap) {
  return from_cap - __fdividef(2 * from_cap, fast_exp2(fminf(product * to_cap, 64.0f)) + 1.0f);
}

// Element 0 of a 16-byte chunk. Rows are whole 128 bytes wide and the chunks within those permuted by the row's number, so
// that the eight rows that ldmatrix reads at once lie in different banks.
template <class T>
__device__ __forceinline__ T* chunk_at(T* tile, int row, int chunk, int width) {
  return tile + row * width + ((chunk ^ (row & 7)) << 3);
}

// Copies kRows rows of `dim` values into rows first .. of a tile, one warp together. Lane i < kRows holds the offset of
// row first + i in `from`, negative for zeros. Columns from dim on up to `wide` become zeros.
template <class T, int kRows>
__device__ __forceinline__ void copy_rows(const T* from, int dim, int wide, int64_t offset, T* tile, int first,
                                          int width) {
  const int lane = threadIdx.x % 32;
  const int shift = wide <= 64 ? 3 : wide <= 128 ? 4 : 5;  // chunks of a row, as a power of two
  const int chunk = lane & ((1 << shift) - 1);
  const int step = 32 >> shift;
#pragma unroll 4
  for (int r = lane >> shift; r < kRows; r += step) {
    const int64_t row = __shfl_sync(kFullWarp, offset, r);
    if (chunk * 8 < wide) {
      const bool full = row >= 0 && chunk * 8 < dim;
      cp_async_16(chunk_at(tile, first + r, chunk, width), full ? from + row + chunk * 8 : from, full);
    }
  }
}

// scores[m][n] = row first_a + m of a . row first_b + n of b: kRowTiles tiles of 16 rows by kColumns, as mma's results lie
// (ptx/mma.cuh). kDim: the rows' length if it is known to the compiler, else 0.
template <class T, int kRowTiles, int kColumns, int kDim>
__device__ __forceinline__ void multiply_rows(const T* a, int first_a, const T* b, int first_b, int width, int dim,
                                              float (&scores)[kRowTiles][kColumns / 8][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) scores[i][n][0] = scores[i][n][1] = scores[i][n][2] = scores[i][n][3] = 0;
  }
  auto step = [&](int s) {
    uint32_t x[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      ldmatrix_x4(x[i], chunk_at(a, first_a + i * 16 + lane % 16, s * 2 + lane / 16, width));
    }
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t y[4];
      ldmatrix_x4(y, chunk_at(b, first_b + n * 16 + lane / 16 * 8 + lane % 8, s * 2 + lane / 8 % 2, width));
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        mma_m16n8k16<T>(scores[i][n * 2], x[i], y[0], y[1]);
        mma_m16n8k16<T>(scores[i][n * 2 + 1], x[i], y[2], y[3]);
      }
    }
  };
  if constexpr (kDim > 0) {
    // The swizzle repeats after four steps. In a long row ptxas for sm_100 and later keeps the addresses of all steps in
    // registers otherwise, and spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    constexpr int kAtOnce = kDim > 128 ? 4 : kDim / 16;
#else
    constexpr int kAtOnce = kDim / 16;
#endif
#pragma unroll kAtOnce
    for (int s = 0; s < kDim / 16; ++s) step(s);
  } else {
#pragma unroll 2
    for (int s = 0; s < dim / 16; ++s) step(s);
  }
}

}  // namespace kvcache::cuda
