// How the selection kernels cut the candidates of a head into pieces, and what they keep in scratch memory. Functions of
// shapes alone, so that a captured graph stays valid whatever the counts are.
#pragma once
#include <algorithm>
#include <cstdint>

namespace kvcache {

// Scratch: logits [rows, query_heads, stride] float32, then softmax parts [rows, query_heads, pieces, 2] (peak, mass).
struct SelectionPlan {
  int64_t piece;   // candidates of a piece, a multiple of kUnit
  int64_t pieces;  // of one head
  int64_t stride;  // from one line of logits to the next, a multiple of 4: lines are read in vectors
  static constexpr int64_t kUnit = 64;

  int64_t part_offset(int64_t lines) const { return lines * stride; }  // in floats, as the next one
  int64_t floats(int64_t lines) const { return lines * (stride + 2 * pieces); }
};

// Few heads are cut finely enough to occupy every multiprocessor. Many heads could do with one piece each, but theirs
// differ in length, so those are cut too, as far as merging the parts (every block of the vote does it) stays cheap.
constexpr SelectionPlan selection_plan(int64_t rows, int64_t heads, int64_t width) {
  constexpr int64_t kBlocks = 512, kMostParts = 256, kPiece = 2048, kParts = 64;
  constexpr auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t items = std::max<int64_t>(rows * heads, 1);
  const int64_t wanted = std::max(std::min(ceil_div(kBlocks, items), kMostParts),  //
                                  std::min(ceil_div(width, kPiece), kParts));
  const int64_t units = std::max<int64_t>(ceil_div(ceil_div(width, wanted), SelectionPlan::kUnit), 1);
  const int64_t piece = units * SelectionPlan::kUnit;
  return {piece, ceil_div(width, piece), ceil_div(width, 4) * 4};
}

static_assert(selection_plan(1, 8, 131072).piece == 2048 && selection_plan(1, 8, 131072).pieces == 64);
static_assert(selection_plan(1, 8, 4096).piece == 64, "512 blocks also at 4k");
static_assert(selection_plan(1, 1, 131072).pieces == 256);
static_assert(selection_plan(128, 8, 32768).piece == 2048, "enough heads: cut for their different lengths only");
static_assert(selection_plan(128, 8, 1 << 20).pieces == 64);
static_assert(selection_plan(4, 2, 0).pieces == 0 && selection_plan(4, 2, 15).stride == 16);

}  // namespace kvcache
