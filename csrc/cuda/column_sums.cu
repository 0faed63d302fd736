// Attention mass that each entry received: chooses the kernel, adds up pieces. Semantics: column_sums in ops/reference.py.
#include "column_sums.cuh"
#include "ptx/dependent_launch.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) add_pieces(ColumnSumsParams sums, ColumnTiles tiles) {
  const PagedView& view = sums.attention.view;
  const int64_t all = int64_t(view.rows) * view.heads * view.capacity;
  const int64_t place = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= all) return;
  const int64_t item = place / view.capacity;
  const int row = int(item / view.heads);
  const QueryRange range = query_range(sums, tiles, row);
  const bool alive = place % view.capacity < view.counts[item];
  wait_for_dependencies();
  float sum = 0;
  for (int piece = 0; alive && piece < range.pieces; ++piece) sum += sums.attention.scratch[piece * all + place];
  sums.sums[place] = sum;
}

}  // namespace

int64_t column_sums_scratch(const ColumnSumsParams& sums, int multiprocessors) {
  return column_scratch_floats(sums, column_tiles(sums, multiprocessors)) * int64_t{sizeof(float)};
}

int column_sums(const ColumnSumsParams& sums, int multiprocessors, Stream stream) {
  const PagedView& view = sums.attention.view;
  const int64_t all = int64_t(view.rows) * view.heads * view.capacity;
  if (all == 0) return 0;
  const ColumnTiles tiles = column_tiles(sums, multiprocessors);
  const int error =
      tiles.tensor_cores ? column_sums_mma(sums, tiles, stream) : column_sums_general(sums, tiles, stream);
  if (error != 0 || tiles.splits == 1) return error;
  return KVCACHE_LAUNCH_DEPENDENT(add_pieces, ceil_divide(all, kThreads), kThreads, 0, stream, sums, tiles);
}

}  // namespace kvcache::cuda
