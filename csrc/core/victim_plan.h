// How choose_victims cuts the entries of a head among blocks. Functions of shapes alone, so that a captured graph stays
// valid whatever the counts are.
#pragma once
#include <algorithm>
#include <cstdint>

namespace kvcache {

struct VictimPlan {
  int64_t piece;   // entries of a block, a multiple of kUnit
  int64_t pieces;  // of one head; 1: no second launch
  static constexpr int64_t kUnit = 1024;
};

// Few long heads are cut until they occupy every multiprocessor several times over. Short ones stay whole, as a second
// launch takes some microseconds too; where it begins to pay (kUncut) was not measured yet.
constexpr VictimPlan victim_plan(int64_t rows, int64_t heads, int64_t capacity) {
  constexpr int64_t kBlocks = 512, kUncut = 8192, kLeast = 2 * VictimPlan::kUnit;
  constexpr auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t items = std::max<int64_t>(rows * heads, 1);
  const int64_t wanted = capacity <= kUncut ? 1 : std::min(ceil_div(kBlocks, items), ceil_div(capacity, kLeast));
  const int64_t piece =
      std::max<int64_t>(ceil_div(ceil_div(capacity, wanted), VictimPlan::kUnit), 1) * VictimPlan::kUnit;
  return {piece, std::max<int64_t>(ceil_div(capacity, piece), 1)};
}

static_assert(victim_plan(1, 8, 131072).piece == 2048 && victim_plan(1, 8, 131072).pieces == 64);
static_assert(victim_plan(1, 1, 1 << 20).pieces == 512, "one head of a million entries");
static_assert(victim_plan(1, 8, 8192).pieces == 1 && victim_plan(1, 8, 8193).pieces == 5);
static_assert(victim_plan(32, 8, 131072).pieces == 2, "all layers of a model as rows: nearly enough heads");
static_assert(victim_plan(128, 8, 131072).pieces == 1, "enough heads");
static_assert(victim_plan(0, 8, 0).pieces == 1 && victim_plan(1, 8, 0).pieces == 1);

}  // namespace kvcache
