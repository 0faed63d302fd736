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
inline SelectionPlan selection_plan(int64_t rows, int64_t heads, int64_t width) {
  constexpr int64_t kBlocks = 512, kPiece = 2048, kParts = 64;
  auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t items = std::max<int64_t>(rows * heads, 1);
  const int64_t wanted = std::max(ceil_div(kBlocks, items), std::min(ceil_div(width, kPiece), kParts));
  SelectionPlan plan;
  plan.piece = std::max(ceil_div(ceil_div(width, wanted), SelectionPlan::kUnit), int64_t{1}) * SelectionPlan::kUnit;
  plan.pieces = ceil_div(width, plan.piece);
  plan.stride = ceil_div(width, 4) * 4;
  return plan;
}

}  // namespace kvcache
