// The frame of the decode kernels: a worker's way through its share, whatever computes (decode_mma.cuh, decode_plain.cuh).
//
// Private: each warp loads its parts of the tiles and computes them for all heads of the group, on its own: no barrier of
// the block until the item ends and the warps' results are merged. Shared: for large groups, the heads are divided among
// the warps and all of them compute all parts.
#pragma once
#include "decode_statistics.cuh"
#include "decode_stream.cuh"
#include "ptx/dependent_launch.cuh"

namespace kvcache::cuda {

constexpr int kSharedWarps = 8;

// The item at hand.
struct DecodeItem {
  int item, row, head;
  int first_head, heads;  // query heads of the group in this pass
  int worker;
  DecodePiece piece;
  int count;
};

// How a block's dynamic shared memory is divided; in bytes.
struct DecodeLayout {
  int64_t notes, states, work, total;
  int state_rows;

  // The ring comes first. `heads`: of a pass. `work`: what the core wants for queries, and later for the merge.
  template <class Core>
  __host__ __device__ static DecodeLayout of(const DecodeLaunch& d, int parts, int stages) {
    DecodeLayout layout;
    layout.state_rows = Core::kShared ? 1 : parts;
    layout.notes = parts * stages * Core::part_bytes(d);
    layout.states = layout.notes + parts * stages * int64_t(sizeof(PartNote));
    layout.work = layout.states + int64_t(layout.state_rows) * Core::kHeads * 3 * sizeof(float);
    layout.work = (layout.work + 15) / 16 * 16;
    layout.total = layout.work + Core::work_bytes(d, parts);
    return layout;
  }
};

template <class Core>
DecodeNeeds decode_needs(const DecodeLaunch& d, int64_t limit) {
  const DecodeBlock block = decode_block(Core::part_bytes(d), limit, Core::kBlocks, [&](int32_t parts) {
    return DecodeLayout::of<Core>(d, parts, 1).total - parts * (Core::part_bytes(d) + int64_t(sizeof(PartNote))) +
           6 * parts * int64_t(sizeof(PartNote));
  });
  return {block, DecodeLayout::of<Core>(d, block.parts, block.stages).total};
}

// Waits until the oldest of the stages - 1 groups of copies that are under way has landed.
__device__ __forceinline__ void wait_for_stage(int stages) {
  switch (stages) {
    case 2:
      cp_async_wait<0>();
      break;
    case 3:
      cp_async_wait<1>();
      break;
    case 4:
      cp_async_wait<2>();
      break;
    case 5:
      cp_async_wait<3>();
      break;
    default:
      cp_async_wait<4>();
      break;
  }
}

// Merges the states that the warps left, [rows, kHeads] each: `factors` is what each warp's sums are to be multiplied by
// so that their total is the piece's result. Writes the log-sum-exp, or the state of a piece that is not all of the item.
template <int kHeads>
__device__ void merge_states(const DecodeLaunch& d, const DecodeItem& at, int rows, float* peaks, const float* masses,
                             float* factors) {
  for (int h = threadIdx.x; h < at.heads; h += blockDim.x) {
    float peak = -kInfinity, mass = 0.0f;
    bool seen = false;
    for (int i = 0; i < rows; ++i) {
      peak = fmaxf(peak, peaks[i * kHeads + h]);
      seen |= masses[i * kHeads + h] >= 0.0f;
    }
    const float level = peak == -kInfinity ? 0.0f : peak;
    for (int i = 0; i < rows; ++i) {
      const float factor = exp2f(peaks[i * kHeads + h] - level);
      mass += fmaxf(masses[i * kHeads + h], 0.0f) * factor;
      factors[i * kHeads + h] = factor;
    }
    if (!seen) mass = -1.0f;
    const int in_group = at.first_head + h, query_head = at.head * d.group + in_group;
    if (at.piece.whole()) {
      const HeadEnd end = end_head(d.p, query_head, peak, mass);
      for (int i = 0; i < rows; ++i) factors[i * kHeads + h] *= end.factor;
      d.p.lse[int64_t(at.row) * d.p.query_heads + query_head] = end.level * kLn2;
    } else {
      d.partial_state[int64_t(at.piece.partial(at.worker)) * d.group + in_group] = make_float2(peak, mass);
    }
  }
}

// Where a query head's result goes: the output, or the partial results.
struct DecodeTarget {
  float* partial;  // [v_dim] or null
  int64_t offset;  // in the output

  __device__ __forceinline__ DecodeTarget(const DecodeLaunch& d, const DecodeItem& at, int in_pass) {
    const int64_t in_group = at.first_head + in_pass, dim = d.p.view.v_dim;
    partial =
        at.piece.whole() ? nullptr : d.partial_out + (int64_t(at.piece.partial(at.worker)) * d.group + in_group) * dim;
    offset = (int64_t(at.row) * d.p.query_heads + at.head * int64_t(d.group) + in_group) * dim;
  }
  template <class T>
  __device__ __forceinline__ void store(const DecodeLaunch& d, int v, float value) const {
    if (partial) partial[v] = value;
    else static_cast<T*>(d.p.out)[offset + v] = from_float<T>(value);
  }
};

// Statistics of the item, as far as this block can do it: all of it if the piece is whole.
__device__ inline void item_statistics(const DecodeLaunch& d, const DecodeItem& at) {
  const DecodePiece& piece = at.piece;
  if (d.p.index && d.p.statistics_decay != 1.0f) {
    const int64_t pieces = piece.to - piece.from + 1, mine = at.worker - piece.from;
    decay_statistics(d, at.item, int(at.count * mine / pieces), int(at.count * (mine + 1) / pieces));
  }
  if (!piece.whole()) return;
  __syncthreads();  // the weights are written, the log-sum-exps too, and the decay is done
  const float* lse = d.p.lse + int64_t(at.row) * d.p.query_heads + at.head * d.group;  // [group]
  add_statistics(d, at.item, at.row, at.head, piece.begin, piece.end, at.count, [&](int h) { return lse[h] * kLog2E; });
}

// One block. `shared` is its dynamic shared memory.
template <class Core>
__device__ __forceinline__ void decode_worker(const DecodeLaunch& d, unsigned char* shared) {
  __shared__ int4 planned[3];  // the plan's head, this worker's share
  wait_for_dependencies();
  launch_dependents();
  const int worker = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x < 3) {
    const void* from = threadIdx.x == 0 ? static_cast<const void*>(&d.plan->head) : &d.plan->shares[worker];
    planned[threadIdx.x] = static_cast<const int4*>(from)[threadIdx.x == 2];
  }
  __syncthreads();
  const int items = planned[0].x, unit = planned[0].y;  // DecodePlanHead
  const DecodeShare& share = *reinterpret_cast<const DecodeShare*>(planned + 1);
  if (items != d.p.view.rows * d.p.view.heads || share.empty()) return;  // somebody else's plan

  const DecodeLayout layout = DecodeLayout::of<Core>(d, d.parts, d.stages);
  const int part_bytes = Core::part_bytes(d), tile = d.parts * kPart;
  PartNote* notes = reinterpret_cast<PartNote*>(shared + layout.notes);  // [parts, stages]
  float* peaks = reinterpret_cast<float*>(shared + layout.states);       // [state_rows, kHeads]
  float* masses = peaks + layout.state_rows * Core::kHeads;
  float* factors = masses + layout.state_rows * Core::kHeads;
  Core core(d, shared + layout.work, warp, lane);
  if (Core::clear_ring(d)) {
    for (int64_t i = threadIdx.x * 4; i < layout.notes; i += blockDim.x * 4) *reinterpret_cast<int*>(shared + i) = 0;
    __syncthreads();
  }

  const bool loads = warp < d.parts;
  for (int first_head = 0; first_head < d.group; first_head += Core::kHeads) {
    DecodeItem at;
    at.first_head = first_head;
    at.heads = min(d.group - first_head, Core::kHeads);
    at.worker = worker;
    EntryStream<typename Core::Row> stream(d, share, unit, worker, loads ? warp : 0, lane);
    const auto load = [&](int stage) {
      if (loads && stream.more()) {
        const int place = warp * d.stages + stage;
        unsigned char* part = shared + int64_t(place) * part_bytes;
        stream.issue(notes + place, lane, [&](auto row, uint32_t visible) { core.copy(d, part, row, visible); });
      }
      cp_async_commit();  // even if there is nothing: groups are counted
    };
    for (int stage = 0; stage < d.stages - 1; ++stage) load(stage);

    int stage = 0;
    for (at.item = share.first; at.item <= share.last; ++at.item) {
      const RowHead here = row_head(d.p.view, at.item);
      at.row = here.row, at.head = here.head;
      core.load_queries(d, at);
      core.reset();
      __syncthreads();
      int place = at.item == share.first ? share.first_unit * unit : 0;  // of the tile
      for (bool last = false; !last; place += tile) {
        wait_for_stage(d.stages);
        if constexpr (Core::kShared) __syncthreads();
        else __syncwarp();
        load(stage == 0 ? d.stages - 1 : stage - 1);  // that one has been computed by all
        const int begin = Core::kShared ? 0 : warp, end = Core::kShared ? d.parts : warp + 1;
        for (int part = begin; part < end; ++part) {
          const PartNote& note = notes[part * d.stages + stage];
          last = note.last != 0;
          core.step(d, at, shared + int64_t(part * d.stages + stage) * part_bytes, note, place + part * kPart);
        }
        stage = stage + 1 == d.stages ? 0 : stage + 1;
      }
      const Lengths now = lengths_of(d.p, at.item, at.row, at.head);
      at.piece = decode_piece(share, worker, at.item, unit, now.places);
      at.count = now.count;
      core.leave_state(at, peaks, masses);
      __syncthreads();
      merge_states<Core::kHeads>(d, at, layout.state_rows, peaks, masses, factors);
      __syncthreads();
      core.finish(d, at, factors);
      if (d.weights && first_head + Core::kHeads >= d.group) item_statistics(d, at);
      __syncthreads();  // before the queries of the next item overwrite what this one still reads
    }
  }
}

}  // namespace kvcache::cuda
