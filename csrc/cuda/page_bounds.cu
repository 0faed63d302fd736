// page_bounds: smallest and largest key of every live page, per channel, from the keys themselves.
#include "page_bounds.cuh"

#include <algorithm>

#include "kernels.h"
#include "ptx/dependent_launch.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kThreads = 128, kBatch = 8;

// One thread per page and n neighbouring channels, block_pages pages per block.
template <class T, int n>
__global__ __launch_bounds__(kThreads) void bound_pages(PageBoundsParams p, int block_pages) {
  wait_for_dependencies();
  launch_dependents();
  const PagedView& view = p.view;
  const int64_t pages = int64_t(view.rows) * view.heads * view.table_width;
  const int64_t first = int64_t(blockIdx.x) * block_pages;
  const int units = view.k_dim / n;
  for (unsigned i = threadIdx.x; i < unsigned(block_pages) * units; i += kThreads) {
    const int64_t at = first + i / units;  // in the table
    if (at >= pages) continue;
    const int64_t item = at / view.table_width;
    const int64_t begin = (at - item * view.table_width) * view.page_size;
    const int live = int(min(int64_t(view.page_size), view.counts[item] - begin));
    if (live <= 0) continue;
    const int64_t page = view.table[at];
    const int channel = int(i % units) * n, dim = view.k_dim;
    const T* keys = static_cast<const T*>(view.k_pages) + page * view.page_size * dim + channel;  // [page_size, dim]
    ChannelBounds<T, n> bounds;
    bounds.start();
    bounds.template include_rows<kBatch>(keys, live, dim);
    bounds.store(static_cast<T*>(p.bounds) + page * 2 * dim + channel, dim);
  }
}

using Kernel = void (*)(PageBoundsParams, int);
// [dtype][with vectors]
const Kernel kKernels[3][2] = {{bound_pages<float, 1>, bound_pages<float, 4>},
                               {bound_pages<bf16, 1>, bound_pages<bf16, 8>},
                               {bound_pages<f16, 1>, bound_pages<f16, 8>}};

}  // namespace

int page_bounds(const PageBoundsParams& p, Stream stream) {
  const PagedView& view = p.view;
  const int bytes = element_bytes(view.dtype);
  const bool wide = common_unit(address(view.k_pages), address(p.bounds), view.k_dim * bytes) == 16;
  const int units = view.k_dim / (wide ? 16 / bytes : 1);
  const int64_t pages = int64_t(view.rows) * view.heads * view.table_width;
  if (pages == 0 || units == 0) return 0;
  const int block_pages = std::max(1, kThreads / units);
  const int64_t blocks = ceil_div(pages, block_pages);
  if (blocks > INT32_MAX) return kInvalidConfiguration;
  const Kernel bound_pages_of_type = kKernels[int(view.dtype)][wide];
  return KVCACHE_LAUNCH_DEPENDENT(bound_pages_of_type, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, p,
                                  block_pages);
}

}  // namespace kvcache::cuda
