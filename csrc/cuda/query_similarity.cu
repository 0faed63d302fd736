// Cosine of two queries over all their heads: the Selection Cache asks it at every step (TokenSelect, Algorithm 1).
#include "block_sum.cuh"
#include "device.cuh"
#include "kernels.h"
#include "types.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__device__ __forceinline__ float element(const Strided4& x, int64_t row, int i, int dim) {
  return to_float(static_cast<const T*>(x.data)[row * x.stride[0] + i / dim * x.stride[1] + i % dim]);
}

// One block per row. Both are brought to length 1 before they are multiplied, as torch does it: the products of long
// vectors would overflow.
template <class A, class B>
__global__ void __launch_bounds__(kThreads, 4) query_similarity_kernel(SimilarityParams p) {
  KVCACHE_DYNAMIC_SHARED(float, shared);
  const int64_t row = blockIdx.x;
  const int n = p.query_heads * p.dim;
  float a_square = 0, b_square = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const float a = element<A>(p.a, row, i, p.dim), b = element<B>(p.b, row, i, p.dim);
    a_square += a * a;
    b_square += b * b;
  }
  constexpr float kLeast = 1e-8f;
  const float a_length = fmaxf(sqrtf(block_sum<kThreads>(a_square, shared)), kLeast);
  const float b_length = fmaxf(sqrtf(block_sum<kThreads>(b_square, shared)), kLeast);
  float product = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    product += element<A>(p.a, row, i, p.dim) / a_length * (element<B>(p.b, row, i, p.dim) / b_length);
  }
  product = block_sum<kThreads>(product, shared);
  if (threadIdx.x == 0) p.out[row] = product;
}

template <class A>
int with_first(const SimilarityParams& p, Stream stream) {
  constexpr int64_t kShared = kThreads / 32 * sizeof(float);
  switch (p.b.dtype) {
    case DType::kFloat32:
      return KVCACHE_LAUNCH((query_similarity_kernel<A, float>), p.rows, kThreads, kShared, stream, p);
    case DType::kBFloat16:
      return KVCACHE_LAUNCH((query_similarity_kernel<A, bf16>), p.rows, kThreads, kShared, stream, p);
    default:
      return KVCACHE_LAUNCH((query_similarity_kernel<A, f16>), p.rows, kThreads, kShared, stream, p);
  }
}

}  // namespace

int query_similarity(const SimilarityParams& p, Stream stream) {
  if (p.rows == 0) return 0;
  switch (p.a.dtype) {
    case DType::kFloat32:
      return with_first<float>(p, stream);
    case DType::kBFloat16:
      return with_first<bf16>(p, stream);
    default:
      return with_first<f16>(p, stream);
  }
}

}  // namespace kvcache::cuda
