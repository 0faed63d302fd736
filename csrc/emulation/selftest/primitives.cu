// Every primitive of the emulation against a plain computation: that a bug is caught says nothing about right kernels
// getting right numbers. tests/emulation/test_primitives.py runs these and demands one for whatever a kernel uses.
#include "../../cuda/ptx/cache_hint.cuh"
#include "../../cuda/ptx/ldmatrix.cuh"
#include "../../cuda/ptx/load.cuh"
#include "../../cuda/ptx/mma.cuh"
#include "../../cuda/ptx/movmatrix.cuh"
#include "planted.h"

namespace kvcache::cuda::planted {
namespace {

// Small integers without a pattern, which every type holds and whose sums are exact.
constexpr int number(unsigned i) { return int((i + 1) * 2654435761u >> 21) % 31 - 15; }

// --- shuffles: out[lane] is that of the lane which CUDA's guide names, in segments of `width` lanes

template <class T>
__global__ void shuffles(T* out, int width) {  // [6][32]
  const int lane = int(threadIdx.x);
  const T mine = T(number(unsigned(lane)));
  out[lane] = __shfl_sync(kFullWarp, mine, lane * 7 + 3, width);
  out[32 + lane] = __shfl_xor_sync(kFullWarp, mine, 5, width);
  out[64 + lane] = __shfl_up_sync(kFullWarp, mine, 3, width);
  out[96 + lane] = __shfl_down_sync(kFullWarp, mine, 3, width);
  if (lane < 16) {  // half a warp for itself
    out[128 + lane] = __shfl_xor_sync(0xffffu, mine, 9);
  } else {
    out[128 + lane] = __shfl_sync(0xffff0000u, mine, 16);
  }
  out[160 + lane] = T(int(warp_sum(float(mine))) * 100 + warp_max(int(mine)));
}

template <class T>
std::string shuffles_of() {
  int sum = 0, most = -99;
  for (unsigned i = 0; i < 32; ++i) {
    sum += number(i);
    most = number(i) > most ? number(i) : most;
  }
  for (int width : {32, 16, 8, 4}) {
    Buffer<T> out(6 * 32);
    const int error = KVCACHE_LAUNCH(shuffles<T>, 1, 32, 0, nullptr, out.data(), width);
    const std::string wrong = verdict(error, out, [&](size_t i) {
      const int lane = int(i % 32), base = lane / width * width, inside = lane % width;
      switch (i / 32) {
        case 0:
          return number(unsigned(base + (lane * 7 + 3) % width));
        // From an earlier segment a lane may read, from a later one it may not.
        case 1:
          return number(unsigned((lane ^ 5) / width > lane / width ? lane : lane ^ 5));
        case 2:
          return number(unsigned(inside < 3 ? lane : lane - 3));
        case 3:
          return number(unsigned(inside + 3 >= width ? lane : lane + 3));
        case 4:
          return number(unsigned(lane < 16 ? lane ^ 9 : 16));
        default:
          return sum * 100 + most;
      }
    });
    if (!wrong.empty()) return "width " + std::to_string(width) + ": " + wrong;
  }
  return "";
}

KVCACHE_PRIMITIVE(shuffles_of_int) { return shuffles_of<int>(); }
KVCACHE_PRIMITIVE(shuffles_of_float) { return shuffles_of<float>(); }
KVCACHE_PRIMITIVE(shuffles_of_long) { return shuffles_of<long long>(); }
KVCACHE_PRIMITIVE(shuffles_of_double) { return shuffles_of<double>(); }

// --- votes and reductions

__global__ void votes(unsigned* out, unsigned chosen) {  // [10][32]
  const unsigned lane = threadIdx.x;
  const int mine = number(lane), yes = int(chosen >> lane & 1);
  out[lane] = __ballot_sync(kFullWarp, yes);
  out[32 + lane] = unsigned(__any_sync(kFullWarp, yes));
  out[64 + lane] = unsigned(__all_sync(kFullWarp, yes));
  out[96 + lane] = __match_any_sync(kFullWarp, mine % 3);
  out[128 + lane] = unsigned(__reduce_add_sync(kFullWarp, mine));
  out[160 + lane] = unsigned(__reduce_min_sync(kFullWarp, mine));
  out[192 + lane] = unsigned(__reduce_max_sync(kFullWarp, mine));
  out[224 + lane] = __reduce_or_sync(kFullWarp, unsigned(yes) << lane);
  out[256 + lane] = __reduce_and_sync(kFullWarp, ~(unsigned(yes) << lane));
  out[288 + lane] = lane % 2 ? __ballot_sync(0xaaaaaaaau, yes) : __ballot_sync(0x55555555u, yes);
}

KVCACHE_PRIMITIVE(votes_and_reductions) {
  for (unsigned chosen : {0u, ~0u, 0x80000001u, 0x12345678u}) {
    int add = 0, low = 99, high = -99;
    for (unsigned i = 0; i < 32; ++i) {
      add += number(i);
      low = number(i) < low ? number(i) : low;
      high = number(i) > high ? number(i) : high;
    }
    Buffer<unsigned> out(10 * 32);
    const int error = KVCACHE_LAUNCH(votes, 1, 32, 0, nullptr, out.data(), chosen);
    const std::string wrong = verdict(error, out, [&](size_t i) -> unsigned {
      const unsigned lane = unsigned(i % 32);
      unsigned same = 0;
      for (unsigned other = 0; other < 32; ++other) same |= unsigned(number(other) % 3 == number(lane) % 3) << other;
      const unsigned all[10] = {
          chosen,        chosen != 0,    chosen == ~0u, same,    unsigned(add),
          unsigned(low), unsigned(high), chosen,        ~chosen, chosen & (lane % 2 ? 0xaaaaaaaau : 0x55555555u)};
      return all[i / 32];
    });
    if (!wrong.empty()) return wrong;
  }
  return "";
}

__global__ void block_votes(int* out, int most) {  // [3][96]
  const int i = int(threadIdx.x);
  out[i] = __syncthreads_or(i >= most);
  out[96 + i] = __syncthreads_and(i < most);
  out[192 + i] = __syncthreads_count(i < most);
}

KVCACHE_PRIMITIVE(votes_of_a_block) {
  for (int most : {0, 1, 40, 96}) {
    Buffer<int> out(3 * 96);
    const int error = KVCACHE_LAUNCH(block_votes, 1, 96, 0, nullptr, out.data(), most);
    const std::string wrong = verdict(error, out, [&](size_t i) {
      return i < 96 ? most < 96 : i < 192 ? most == 96 : most;
    });
    if (!wrong.empty()) return wrong;
  }
  return "";
}

// --- atomics, of shared memory by a block and of global memory by three; what they return shows every step once

template <class T>
__global__ void atomics(T* out, T* seen) {  // [8], [3 * 64]
  KVCACHE_DYNAMIC_SHARED(T, sum);           // [1]
  const int i = int(threadIdx.x);
  if (i == 0) *sum = T(0);
  __syncthreads();
  atomicAdd(sum, T(1));
  __syncthreads();
  if (i == 0) atomicAdd(&out[0], *sum);
  const T mine = T(int(blockIdx.x) * 64 + i);
  seen[int(atomicAdd(&out[1], T(1)))] = T(1);
  atomicSub(&out[2], T(2));
  atomicMin(&out[3], mine);
  atomicMax(&out[4], mine);
  if (i == 5) atomicExch(&out[5], T(7));
  for (T old = atomicAdd(&out[6], T(0)), next; (next = atomicCAS(&out[6], old, T(old + 3))) != old;) old = next;
}

template <class T>
std::string atomics_of() {
  Buffer<T> out(8), seen(3 * 64);
  out[2] = T(384);
  out[3] = T(1000);
  const int error = KVCACHE_LAUNCH(atomics<T>, 3, 64, sizeof(T), nullptr, out.data(), seen.data());
  const int want[8] = {192, 192, 0, 0, 191, 7, 3 * 192, 0};
  const std::string wrong = verdict(error, out, [&](size_t i) { return want[i]; });
  return wrong.empty() ? verdict(0, seen, [](size_t) { return 1; }) : wrong;
}

KVCACHE_PRIMITIVE(atomics_of_int) { return atomics_of<int>(); }
KVCACHE_PRIMITIVE(atomics_of_unsigned) { return atomics_of<unsigned>(); }
KVCACHE_PRIMITIVE(atomics_of_long) { return atomics_of<unsigned long long>(); }

__global__ void float_atomics(float* out) {  // [1]
  atomicAdd(out, float(threadIdx.x));
}

KVCACHE_PRIMITIVE(atomics_of_float) {
  Buffer<float> out(1);
  return verdict(KVCACHE_LAUNCH(float_atomics, 2, 64, 0, nullptr, out.data()), out, [](size_t) { return 2 * 63 * 32; });
}

__global__ void bit_atomics(unsigned* out) {  // [5]
  const unsigned i = threadIdx.x;
  atomicOr(&out[0], 1u << i);
  atomicAnd(&out[1], ~(1u << i));
  atomicXor(&out[2], 3u << i);
  atomicInc(&out[3], 9u);
  atomicDec(&out[4], 9u);
}

KVCACHE_PRIMITIVE(atomics_of_bits) {
  Buffer<unsigned> out(5);
  out[1] = ~0u;
  const unsigned want[5] = {0x00ffffffu, 0xff000000u, 1u | 1u << 24, 24 % 10, 10 - 24 % 10};
  return verdict(KVCACHE_LAUNCH(bit_atomics, 1, 24, 0, nullptr, out.data()), out, [&](size_t i) { return want[i]; });
}

// --- tensor cores

// c[16][8] = c + a[16][16] * b[16][8], fragments as PTX's manual draws them; c and d go through the same registers.
template <class T>
__global__ void product(float* d, const float* a, const float* b) {
  const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4 * 2;
  const uint32_t a_words[4] = {
      pack2<T>(a[g * 16 + t], a[g * 16 + t + 1]), pack2<T>(a[(g + 8) * 16 + t], a[(g + 8) * 16 + t + 1]),
      pack2<T>(a[g * 16 + t + 8], a[g * 16 + t + 9]), pack2<T>(a[(g + 8) * 16 + t + 8], a[(g + 8) * 16 + t + 9])};
  const uint32_t b0 = pack2<T>(b[t * 8 + g], b[(t + 1) * 8 + g]), b1 = pack2<T>(b[(t + 8) * 8 + g], b[(t + 9) * 8 + g]);
  float c[4] = {d[g * 8 + t], d[g * 8 + t + 1], d[(g + 8) * 8 + t], d[(g + 8) * 8 + t + 1]};
  mma_m16n8k16<T>(c, a_words, b0, b1);
  d[g * 8 + t] = c[0], d[g * 8 + t + 1] = c[1], d[(g + 8) * 8 + t] = c[2], d[(g + 8) * 8 + t + 1] = c[3];
}

template <class T>
std::string product_of() {
  Buffer<float> d(16 * 8), a(16 * 16), b(16 * 8);
  for (size_t i = 0; i < a.size(); ++i) a[i] = float(number(unsigned(i)));
  for (size_t i = 0; i < b.size(); ++i) b[i] = float(number(unsigned(i + 999))), d[i] = float(number(unsigned(i + 5)));
  return verdict(KVCACHE_LAUNCH(product<T>, 1, 32, 0, nullptr, d.data(), a.data(), b.data()), d, [](size_t i) {
    int sum = number(unsigned(i + 5));
    for (size_t k = 0; k < 16; ++k) sum += number(unsigned(i / 8 * 16 + k)) * number(unsigned(k * 8 + i % 8 + 999));
    return sum;
  });
}

KVCACHE_PRIMITIVE(mma_of_bf16) { return product_of<bf16>(); }
KVCACHE_PRIMITIVE(mma_of_f16) { return product_of<f16>(); }

constexpr int kPitch = 24;  // values per row: rows are 16-byte aligned and not neighbours

// out[form][tile][lane][2] from four tiles of 8 x 8, of which row y's value x is 64 * tile + 8 * y + x.
__global__ void matrices(unsigned* out) {  // [4][4][32][2]
  KVCACHE_DYNAMIC_SHARED(uint16_t, s);     // [32][kPitch]
  const int lane = int(threadIdx.x);
  for (int x = 0; x < 8; ++x) s[lane * kPitch + x] = uint16_t(lane * 8 + x);
  __syncwarp();
  const uint16_t* row = s + lane * kPitch;
  uint32_t r4[4], r2[2];
  auto put = [&](int form, int tile, uint32_t word) {
    out[((form * 4 + tile) * 32 + lane) * 2] = word & 0xffff;
    out[((form * 4 + tile) * 32 + lane) * 2 + 1] = word >> 16;
  };
  ldmatrix_x4(r4, row);
  for (int i = 0; i < 4; ++i) put(0, i, r4[i]);
  ldmatrix_x4_trans(r4, row);
  for (int i = 0; i < 4; ++i) put(1, i, r4[i]);
  ldmatrix_x2(r2, lane < 16 ? row : nullptr);  // the others' addresses do not matter
  for (int i = 0; i < 2; ++i) put(2, i, r2[i]);
  ldmatrix_x2_trans(r2, lane < 16 ? row : nullptr);
  for (int i = 0; i < 2; ++i) put(3, i, r2[i]);
  // From the registers of ldmatrix's plain form to those of its transposed one.
  ldmatrix_x4(r4, row);
  put(2, 2, transpose_8x8(r4[0]));
  put(3, 2, transpose_8x8(r4[3]));
}

KVCACHE_PRIMITIVE(matrices_from_shared_memory) {
  Buffer<unsigned> out(4 * 4 * 32 * 2);
  const int error = KVCACHE_LAUNCH(matrices, 1, 32, 32 * kPitch * 2, nullptr, out.data());
  return verdict(error, out, [](size_t i) -> size_t {
    const size_t j = i % 2, lane = i / 2 % 32, outer = lane / 4, inner = lane % 4 * 2 + j;
    size_t tile = i / 64 % 4, form = i / 256;
    if (form >= 2 && tile == 3) return 0;  // nothing
    if (form >= 2 && tile == 2) tile = form == 2 ? 0 : 3, form = 1;
    return tile * 64 + (form % 2 ? inner * 8 + outer : outer * 8 + inner);
  });
}

// --- copies

// Three groups of copies of all sizes; the second wait leaves one group under way. Every other copy brings zeros.
__global__ void copies(float* out, const float* x) {  // [3][32 * 4], the same
  KVCACHE_DYNAMIC_SHARED(float, s);                   // [3][32 * 4]
  const int lane = int(threadIdx.x), at = lane * 4;
  const bool full = lane % 2 == 0;
  cp_async_16_hinted(s + at, x + at, full, l2_policy(true));
  cp_async_commit();
  cp_async_8(s + 128 + at, x + 128 + at, full);
  cp_async_8(s + 128 + at + 2, x + 128 + at + 2);
  cp_async_commit();
  cp_async_4(s + 256 + at, x + 256 + at, full);
  cp_async_4(s + 256 + at + 1, x + 256 + at + 1);
  cp_async_8(s + 256 + at + 2, x + 256 + at + 2);
  cp_async_commit();
  cp_async_wait<1>();
  __syncwarp();
  for (int i = 0; i < 4; ++i) out[at + i] = s[(at + i) ^ 4], out[128 + at + i] = s[128 + ((at + i) ^ 4)];
  __syncwarp();  // others have read what is filled again now
  cp_async_16(s + at, x + at);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  for (int i = 0; i < 4; ++i) out[256 + at + i] = s[256 + ((at + i) ^ 4)] + s[(at + i) ^ 4];
}

KVCACHE_PRIMITIVE(asynchronous_copies) {
  Buffer<float> out(3 * 128);
  alignas(16) static float x[3 * 128];
  if (kvcache_emulated_allow) kvcache_emulated_allow(x, sizeof x, 0);
  for (unsigned i = 0; i < 3 * 128; ++i) x[i] = float(number(i));
  const int error = KVCACHE_LAUNCH(copies, 1, 32, 3 * 128 * 4, nullptr, out.data(), x);
  return verdict(error, out, [](size_t i) {
    const size_t from = i ^ 4, inside = from % 4;
    const bool odd = from / 4 % 2 == 1;
    if (i < 128) return odd ? 0 : number(unsigned(from));
    if (i < 256) return odd && inside < 2 ? 0 : number(unsigned(from));
    return (odd && inside < 1 ? 0 : number(unsigned(from))) + number(unsigned(from - 256));
  });
}

__global__ void loads(unsigned* out, const unsigned* x) {  // [32][4] of a 16-byte load, an 8-byte one, two of 4
  const int lane = int(threadIdx.x);
  const uint4 a = load_streaming(reinterpret_cast<const uint4*>(x) + lane);
  const uint2 b = load_streaming(reinterpret_cast<const uint2*>(x) + lane);
  out[lane * 4] = a.x + 2 * a.y + 3 * a.z + 4 * a.w;
  out[lane * 4 + 1] = b.x - b.y;
  out[lane * 4 + 2] = load_streaming(x + lane);
  out[lane * 4 + 3] = __ldg(x + lane) + __ldcg(x + lane) + __ldcs(x + lane);
}

KVCACHE_PRIMITIVE(loads_past_the_caches) {
  Buffer<unsigned> out(128);
  alignas(16) static unsigned x[128];
  if (kvcache_emulated_allow) kvcache_emulated_allow(x, sizeof x, 0);
  for (unsigned i = 0; i < 128; ++i) x[i] = i * i;
  return verdict(KVCACHE_LAUNCH(loads, 1, 32, 0, nullptr, out.data(), x), out, [](size_t i) -> unsigned {
    const unsigned lane = unsigned(i / 4);
    if (i % 4 == 0) return x[lane * 4] + 2 * x[lane * 4 + 1] + 3 * x[lane * 4 + 2] + 4 * x[lane * 4 + 3];
    if (i % 4 == 1) return x[lane * 2] - x[lane * 2 + 1];
    return i % 4 == 2 ? x[lane] : 3 * x[lane];
  });
}

}  // namespace
}  // namespace kvcache::cuda::planted
