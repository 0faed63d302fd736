// copy_pages: whole pages with their bounds, before a shared page is written to.
#include "kernels.h"
#include "memory.cuh"
#include "ptx/dependent_launch.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kThreads = 128, kPerThread = 4;

template <class Unit>
__global__ __launch_bounds__(kThreads) void copy_units(CopyPagesParams p, int64_t k_units, int64_t v_units,
                                                       int64_t bounds_units, int pieces) {
  wait_for_dependencies();
  launch_dependents();
  const int64_t pair = blockIdx.x / unsigned(pieces);
  const int64_t begin = int64_t(blockIdx.x % unsigned(pieces)) * (kThreads * kPerThread) + threadIdx.x;
  const int64_t source = p.source[pair], target = p.target[pair];
  auto* k = static_cast<Unit*>(p.view.k_pages);  // [pages, k_units]
  auto* v = static_cast<Unit*>(p.view.v_pages);  // [pages, v_units]
  auto* bounds = static_cast<Unit*>(p.bounds);   // [pages, bounds_units]
  const int64_t both = k_units + v_units;
  Unit data[kPerThread];
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const int64_t u = begin + j * kThreads;
    if (u < k_units) {
      data[j] = k[source * k_units + u];
    } else if (u < both) {
      data[j] = v[source * v_units + u - k_units];
    } else if (u < both + bounds_units) {
      data[j] = bounds[source * bounds_units + u - both];
    }
  }
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const int64_t u = begin + j * kThreads;
    if (u < k_units) {
      k[target * k_units + u] = data[j];
    } else if (u < both) {
      v[target * v_units + u - k_units] = data[j];
    } else if (u < both + bounds_units) {
      bounds[target * bounds_units + u - both] = data[j];
    }
  }
}

using Kernel = void (*)(CopyPagesParams, int64_t, int64_t, int64_t, int);
const Kernel kKernels[4] = {copy_units<uint16_t>, copy_units<uint32_t>, copy_units<uint2>, copy_units<uint4>};

}  // namespace

int copy_pages(const CopyPagesParams& p, Stream stream) {
  const int64_t page_bytes = int64_t(p.view.page_size) * element_bytes(p.view.dtype);
  const int64_t k_bytes = page_bytes * p.view.k_dim, v_bytes = page_bytes * p.view.v_dim;
  const int64_t bounds_bytes = p.bounds == nullptr ? 0 : 2 * int64_t(p.view.k_dim) * element_bytes(p.view.dtype);
  const int unit =
      common_unit(address(p.view.k_pages), address(p.view.v_pages), address(p.bounds), k_bytes, v_bytes, bounds_bytes);
  const int64_t pieces = ceil_div((k_bytes + v_bytes + bounds_bytes) / unit, kThreads * kPerThread);
  if (p.n == 0 || pieces == 0) return 0;
  if (pieces > INT32_MAX || p.n * pieces > INT32_MAX) return kInvalidConfiguration;
  const Kernel copy_units_of_page = kKernels[unit_index(unit)];
  return KVCACHE_LAUNCH_DEPENDENT(copy_units_of_page, dim3(unsigned(p.n * pieces)), dim3(kThreads), 0, stream, p,
                                  k_bytes / unit, v_bytes / unit, bounds_bytes / unit, int(pieces));
}

}  // namespace kvcache::cuda
