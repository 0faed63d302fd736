// Bugs around asynchronous copies: a ring of two buffers of 16 floats, filled ahead by cp.async.
#include "../../cuda/ptx/cp_async.cuh"
#include "planted.h"

namespace kvcache::cuda::planted {
namespace {

enum class Bug { kNone, kWeakWait, kNoWait, kNoBarrier, kNoBarrierBeforeRefill, kMisaligned };
constexpr int kTiles = 5;

// out[i] = sum over the tiles of x[tile][i ^ 3]: every thread reads what another one copied.
template <Bug kBug>
__global__ void ring(float* out, const float* x) {  // [16], [kTiles][16]
  KVCACHE_DYNAMIC_SHARED(float, s);                 // [2][16]
  const int i = int(threadIdx.x);
  auto fill = [&](int tile) {
    if (i < 4 && tile < kTiles) {
      cp_async_16(s + tile % 2 * 16 + i * 4 + (kBug == Bug::kMisaligned ? 2 : 0), x + tile * 16 + i * 4);
    }
    cp_async_commit();
  };
  fill(0);
  float sum = 0.0f;
  for (int tile = 0; tile < kTiles; ++tile) {
    fill(tile + 1);
    if (kBug == Bug::kWeakWait) {
      cp_async_wait<2>();
    } else if (kBug != Bug::kNoWait) {
      cp_async_wait<1>();
    }
    if (kBug != Bug::kNoBarrier) __syncthreads();
    if (i < 16) sum += s[tile % 2 * 16 + (i ^ 7)];
    if (kBug != Bug::kNoBarrierBeforeRefill) __syncthreads();
  }
  if (i < 16) out[i] = sum;
}

template <Bug kBug>
std::string ring_case(bool bug) {
  Buffer<float> out(16);
  alignas(16) static float storage[kTiles * 16];
  if (kvcache_emulated_allow) kvcache_emulated_allow(storage, sizeof storage, 0);
  for (int i = 0; i < kTiles * 16; ++i) storage[i] = float(i);
  auto kernel = bug ? &ring<kBug> : &ring<Bug::kNone>;
  const size_t bytes = 2 * 16 * sizeof(float) + (kBug == Bug::kMisaligned ? 16 : 0);
  return verdict(KVCACHE_LAUNCH(kernel, 1, 32, bytes, nullptr, out.data(), storage), out,
                 [](size_t i) { return 5 * (i ^ 7) + 16 * (0 + 1 + 2 + 3 + 4); });
}

KVCACHE_PLANTED(wait_for_too_few_copies) { return ring_case<Bug::kWeakWait>(bug); }
KVCACHE_PLANTED(no_wait_for_copies) { return ring_case<Bug::kNoWait>(bug); }
KVCACHE_PLANTED(no_barrier_behind_the_wait) { return ring_case<Bug::kNoBarrier>(bug); }
KVCACHE_PLANTED(no_barrier_before_the_refill) { return ring_case<Bug::kNoBarrierBeforeRefill>(bug); }
KVCACHE_PLANTED(misaligned_copy) { return ring_case<Bug::kMisaligned>(bug); }

template <bool kBug>
__global__ void copies_to_local(float* out, const float* x) {  // [1], [4]
  KVCACHE_DYNAMIC_SHARED(float, s);                            // [4]
  alignas(16) float local[4] = {};
  cp_async_16(kBug ? local : s, x);
  cp_async_commit();
  cp_async_wait<0>();
  out[0] = kBug ? local[0] : s[0];
}

KVCACHE_PLANTED(copy_to_local_memory) {
  Buffer<float> out(1);
  alignas(16) static float x[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  if (kvcache_emulated_allow) kvcache_emulated_allow(x, sizeof x, 0);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(copies_to_local), 1, 1, 16, nullptr, out.data(), x), out,
                 [](size_t) { return 1; });
}

}  // namespace
}  // namespace kvcache::cuda::planted
