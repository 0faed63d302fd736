// The planner of decode attention, as decode_attention calls it for a single layer without a plan.
#pragma once
#include "decode_attention.cuh"

namespace kvcache::cuda {

struct PlanInput {
  const int32_t* counts;  // [layers, rows, counted_heads]
  int32_t layers, rows, heads;
  int32_t counted_heads;  // heads, or 1: one list for all
  int32_t width;          // counts beyond it are meant to be it
  int32_t factor;         // places for each that is counted
  int32_t added;
  int64_t most;  // places
  int32_t workers;
  int32_t* plan;  // [layers, decode_plan_size(workers)]
};

int plan_items(const PlanInput& in, void* stream);

}  // namespace kvcache::cuda
