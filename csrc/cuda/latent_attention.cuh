// What the kernels of latent attention share. They run in the frame of decode attention (decode_kernel.cuh), as cores of
// the shared kind: all warps compute all entries, each for its own query rows.
//
// A query row is a (token, head) pair: for the frame these are the heads of one group, the rows' only one. An entry in
// shared memory is its latent followed by its rotary key; what the frame calls the size of a value is the latent's width.
#pragma once
#include "decode_kernel.cuh"

namespace kvcache::cuda {

struct LatentLaunch : DecodeLaunch {
  Strided4 q_rope;             // [rows, heads, tokens, rope]
  int32_t heads, tokens;       // of the queries
  int32_t first_token;         // of this launch, which has group / heads of them
  int32_t latent, rope;        // widths
  const int32_t* q_positions;  // [rows, tokens] or null
  const int32_t* q_start;      // [rows, tokens] or null: windows, if they differ within a row
};

// Every launch that the frame hands on is one of these.
__host__ __device__ __forceinline__ const LatentLaunch& latent(const DecodeLaunch& d) {
  return static_cast<const LatentLaunch&>(d);
}

// Logit of a query row (number `in_group`) and a visible slot in base 2, from their product.
__device__ __forceinline__ float latent_logit(const LatentLaunch& d, const DecodeItem& at, int in_group, int slot,
                                              float x) {
  if (d.q_positions || d.q_start) {
    if (in_group >= d.group) return -kInfinity;
    const int64_t place = int64_t(at.row) * d.tokens + d.first_token + in_group / d.heads;
    const int position = d.p.view.positions[int64_t(at.item) * d.p.view.capacity + slot];
    if (d.q_positions && position > d.q_positions[place]) return -kInfinity;
    if (d.q_start && position < d.q_start[place]) return -kInfinity;
  }
  if (d.p.softcap > 0.0f) return tanhf(x * d.scale_in_cap) * (d.p.softcap * kLog2E);
  return x * (d.p.scale * kLog2E);
}

// Where a query row's numbers lie: element offsets into p.q and q_rope.
struct LatentQuery {
  int64_t latent, rope;

  __device__ __forceinline__ LatentQuery(const LatentLaunch& d, const DecodeItem& at, int h) {
    const int in_group = at.first_head + h, token = in_group / d.heads, head = in_group - token * d.heads;
    const auto offset = [&](const Strided4& q) {
      return at.row * q.stride[0] + head * q.stride[1] + int64_t(d.first_token + token) * q.stride[2];
    };
    latent = offset(d.p.q), rope = offset(d.q_rope);
  }
};

DecodeNeeds latent_needs_mma(const LatentLaunch& d, int64_t limit);
int latent_on_mma(const LatentLaunch& d, int64_t shared_bytes, void* stream);
// few: 8 query rows in a pass instead of 32, for devices with less shared memory.
DecodeNeeds latent_needs_plain(const LatentLaunch& d, bool few, int64_t limit);
int latent_on_plain(const LatentLaunch& d, bool few, int64_t shared_bytes, void* stream);

}  // namespace kvcache::cuda
