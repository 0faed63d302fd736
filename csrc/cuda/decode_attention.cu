// Decode attention: which kernel, how large its blocks and its scratch memory are, and the launches.
//
// One query per row over ragged pages: memory-bound, so every key and value is read once for all query heads of its
// group. The entries of all heads are shared out evenly among as many blocks as the device holds (core/decode_plan.h);
// what several blocks share is merged by a second, dependent launch (decode_combine.cu).
#include "decode_attention.cuh"

#include "kernels.h"
#include "plan_decode.cuh"
#if defined(KVCACHE_EMULATED)
#include <cstdlib>
#endif

namespace kvcache::cuda {
int64_t shared_memory_limit() {
#if defined(KVCACHE_EMULATED)
  const char* less = std::getenv("KVCACHE_EMULATED_SHARED");  // as smaller devices have it
  return less ? std::atoll(less) : 227 * 1024;
#else
  constexpr int kDevices = 64;
  static int known[kDevices] = {};  // 0: not asked yet; a race only asks twice
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 48 * 1024;
  if (known[device] == 0) {
    if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
      (void)cudaGetLastError();
      return 48 * 1024;
    }
    known[device] = bytes;
  }
  return known[device];
#endif
}

namespace {

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Places that an item can have, which sizes the weights for the statistics and a plan.
int64_t most_places(const AttentionParams& p) {
  if (!p.index) return p.view.capacity;
  if (!p.index_pages) return p.index_width;
  return (p.index_width < p.view.table_width ? p.index_width : p.view.table_width) * p.view.page_size;
}

enum class Kernel { kBf16, kF16, kPlain };

Kernel kernel_of(const AttentionParams& p) {
  const PagedView& view = p.view;
  const bool sizes = view.k_dim % 16 == 0 && view.v_dim % 16 == 0 && view.k_dim <= 256 && view.v_dim <= 256;
  const bool rows = view.pages * view.page_size < (int64_t(1) << 32);  // MmaCore::Row
  if (view.dtype == DType::kFloat32 || p.q.dtype != view.dtype || p.query_heads == view.heads || !sizes || !rows ||
      !aligned(view.k_pages, 16) || !aligned(view.v_pages, 16)) {
    return Kernel::kPlain;
  }
  return view.dtype == DType::kBFloat16 ? Kernel::kBf16 : Kernel::kF16;
}

DecodeNeeds needs_of(Kernel kernel, const DecodeLaunch& d, int64_t limit) {
  if (kernel == Kernel::kBf16) return decode_needs_bf16(d, limit);
  if (kernel == Kernel::kF16) return decode_needs_f16(d, limit);
  return decode_needs_plain(d, limit);
}

struct Prepared {
  DecodeLaunch launch;
  Kernel kernel;
  int64_t shared_bytes;
  int32_t* own_plan;  // or null
  int64_t scratch;    // bytes
};

// Everything about a launch that shapes and pointers decide.
Prepared prepare(const AttentionParams& p, int multiprocessors) {
  Prepared result{};
  DecodeLaunch& d = result.launch;
  const PagedView& view = p.view;
  d.p = p;
  d.group = p.query_heads / view.heads;
  d.scale_in_cap = p.softcap > 0.0f ? p.scale / p.softcap : 0.0f;
  d.page_size = Divisor::of(view.page_size);
  d.aligned_q = aligned(p.q.data, 16) && p.q.stride[0] % 8 == 0 && p.q.stride[1] % 8 == 0;
  const int64_t element = view.dtype == DType::kFloat32 ? 4 : 2;
  d.grain = 16;
  while (!aligned(view.k_pages, d.grain) || !aligned(view.v_pages, d.grain) || view.k_dim * element % d.grain ||
         view.v_dim * element % d.grain) {
    d.grain /= 2;
  }
  d.k_pieces = Divisor::of(int32_t(view.k_dim * element / d.grain));
  d.v_pieces = Divisor::of(int32_t(view.v_dim * element / d.grain));
  result.kernel = kernel_of(p);
  const int64_t limit = shared_memory_limit() - 128;  // what the kernels declare themselves
  d.shared_parts = true;
  DecodeNeeds needs = needs_of(result.kernel, d, limit);
  if (needs.block.parts == 0) {
    d.shared_parts = false;
    needs = needs_of(result.kernel, d, limit);
  }
  d.parts = needs.block.parts, d.stages = needs.block.stages;
  result.shared_bytes = needs.shared_bytes;

  const int64_t items = int64_t(view.rows) * view.heads, places = most_places(p);
  d.workers = p.plan ? p.plan_workers : needs.block.blocks * (multiprocessors > 0 ? multiprocessors : 1);
  if (!p.plan) {  // no more than there can be units
    const int64_t units = items * (places / kPlanUnit + 1);
    if (units < d.workers) d.workers = int32_t(units);
  }

  char* next = reinterpret_cast<char*>(p.scratch);
  const auto take = [&](int64_t bytes) {
    char* here = next;
    next += round_up(bytes, 16);
    return here;
  };
  if (!p.plan) {
    result.own_plan = reinterpret_cast<int32_t*>(take(decode_plan_size(d.workers) * sizeof(int32_t)));
    d.plan = reinterpret_cast<const DecodePlan*>(result.own_plan);
  } else {
    d.plan = reinterpret_cast<const DecodePlan*>(p.plan);
  }
  const int64_t partials = 2 * int64_t(d.workers) * d.group;
  d.partial_state = reinterpret_cast<float2*>(take(partials * sizeof(float2)));
  d.partial_out = reinterpret_cast<float*>(take(partials * view.v_dim * sizeof(float)));
  if (p.statistics) {
    d.half_weights = result.kernel != Kernel::kPlain;
    d.weight_heads = d.half_weights ? (d.group + 1) / 2 * 2 : d.group;
    d.places = round_up(places, kPlanUnit);
    d.weights = take(items * d.places * d.weight_heads * (d.half_weights ? 2 : 4));
  }
  result.scratch = next - reinterpret_cast<char*>(p.scratch);
  return result;
}

bool nothing_to_do(const AttentionParams& p) { return p.view.rows == 0 || p.view.heads == 0 || p.query_heads == 0; }

}  // namespace

int64_t decode_attention_scratch(const AttentionParams& p, int multiprocessors) {
  return nothing_to_do(p) ? 0 : prepare(p, multiprocessors).scratch;
}

int decode_attention(const AttentionParams& p, int multiprocessors, Stream stream) {
  if (nothing_to_do(p)) return 0;
  const Prepared prepared = prepare(p, multiprocessors);
  const DecodeLaunch& d = prepared.launch;
  if (prepared.own_plan) {
    PlanInput in{};
    in.counts = p.index ? p.index_counts : p.view.counts;
    in.layers = 1, in.rows = p.view.rows, in.heads = p.view.heads;
    in.counted_heads = p.index ? p.index_heads : p.view.heads;
    in.factor = p.index && p.index_pages ? p.view.page_size : 1;
    in.most = most_places(p);
    in.width = int32_t(in.most / in.factor);
    in.workers = d.workers, in.plan = prepared.own_plan;
    if (const int error = plan_items(in, stream)) return error;
  }
  int error = 0;
  if (prepared.kernel == Kernel::kBf16) error = decode_on_bf16(d, prepared.shared_bytes, stream);
  else if (prepared.kernel == Kernel::kF16) error = decode_on_f16(d, prepared.shared_bytes, stream);
  else error = decode_on_plain(d, prepared.shared_bytes, stream);
  return error || d.workers == 1 ? error : decode_combine(d, stream);
}

}  // namespace kvcache::cuda
