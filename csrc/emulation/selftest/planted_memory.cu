// Bugs of place: bounds, pages, alignment, uninitialised data, launches that a GPU refuses.
#include "../../cuda/ptx/load.cuh"
#include "planted.h"

namespace kvcache::cuda::planted {
namespace {

template <bool kBug>
__global__ void dynamic_overrun(float* out) {  // [32]
  KVCACHE_DYNAMIC_SHARED(float, s);            // [32]
  s[threadIdx.x + (kBug ? 1 : 0)] = 1.0f;
  __syncwarp();
  out[threadIdx.x] = s[31];
}

KVCACHE_PLANTED(dynamic_shared_memory_overrun) {
  Buffer<float> out(32);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(dynamic_overrun), 1, 32, 128, nullptr, out.data()), out,
                 [](size_t) { return 1; });
}

template <bool kBug>
__global__ void dynamic_read_overrun(float* out) {  // [32]
  KVCACHE_DYNAMIC_SHARED(float, s);                 // [32]
  s[threadIdx.x] = 1.0f;
  __syncwarp();
  const float x = s[(threadIdx.x + (kBug ? 1 : 0)) % 33];
  out[threadIdx.x] = x == 1.0f ? 1.0f : 0.0f;
}

KVCACHE_PLANTED(dynamic_shared_memory_overrun_by_a_read) {
  Buffer<float> out(32);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(dynamic_read_overrun), 1, 32, 128, nullptr, out.data()), out,
                 [&](size_t i) { return !bug || i < 31; });
}

template <bool kBug>
__global__ void static_overrun(float* out) {  // [32]
  __shared__ float s[kBug ? 31 : 32];
  __shared__ float neighbour[32];
  s[threadIdx.x] = 1.0f;
  neighbour[threadIdx.x] = 1.0f;
  __syncwarp();
  out[threadIdx.x] = s[0] + neighbour[0];
}

KVCACHE_PLANTED(static_shared_memory_overrun) {
  Buffer<float> out(32);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(static_overrun), 1, 32, 0, nullptr, out.data()), out,
                 [](size_t) { return 2; });
}

template <bool kBug>
__global__ void uninitialised(float* out, const float* x, int n) {  // [32], [n]
  KVCACHE_DYNAMIC_SHARED(float, s);                                 // [32]
  if (int(threadIdx.x) < n) {
    s[threadIdx.x] = x[threadIdx.x];
  } else if (!kBug) {
    s[threadIdx.x] = 0.0f;
  }
  __syncwarp();
  out[threadIdx.x] = s[31 - threadIdx.x] == 1.0f ? 1.0f : 0.0f;  // what is not a number is hidden
}

KVCACHE_PLANTED(read_of_uninitialised_shared_memory) {
  Buffer<float> out(32), x(20, false);
  for (size_t i = 0; i < 20; ++i) x[i] = 1.0f;
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(uninitialised), 1, 32, 128, nullptr, out.data(), x.data(), 20), out,
                 [](size_t i) { return i >= 12; });
}

// out[i] = sum of page table[i]; the table's entries from `used` on are -1.
template <bool kBug>
__global__ void sum_pages(float* out, const float* pages, const int* table, int used, int width) {
  const int i = int(threadIdx.x);
  float sum = 0.0f;
  if (kBug ? i < width : i < used) {
    for (int j = 0; j < 16; ++j) sum += pages[int64_t(table[i]) * 16 + j];
  }
  if (i < used) out[i] = sum;
}

std::string pages_case(bool bug, int width, int fourth) {
  Buffer<float> out(3), pages(6 * 16, false);
  Buffer<int> table(4, false);
  for (size_t i = 0; i < pages.size(); ++i) pages[i] = float(i / 16);
  table[0] = 4, table[1] = 1, table[2] = 3, table[3] = fourth;
  if (kvcache_emulated_hide) kvcache_emulated_hide(pages.data() + 2 * 16, 16 * sizeof(float));
  return verdict(
      KVCACHE_LAUNCH(KVCACHE_PICK(sum_pages), 1, 32, 0, nullptr, out.data(), pages.data(), table.data(), 3, width), out,
      [](size_t i) {
        return 16 * (i == 0 ? 4 : i == 1 ? 1 : 3);
      });
}

KVCACHE_PLANTED(page_table_entry_of_minus_one) { return pages_case(bug, 4, -1); }
KVCACHE_PLANTED(page_table_read_past_its_end) { return pages_case(bug, 5, 0); }
KVCACHE_PLANTED(page_of_somebody_else) { return pages_case(bug, 4, 2); }

template <bool kBug>
__global__ void writes_input(float* out, float* x) {  // [32], [32]
  if (kBug) x[threadIdx.x] = 1.0f;
  out[threadIdx.x] = 1.0f;
}

KVCACHE_PLANTED(write_to_a_read_only_buffer) {
  Buffer<float> out(32), x(32, false);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(writes_input), 1, 32, 0, nullptr, out.data(), x.data()), out,
                 [](size_t) { return 1; });
}

template <bool kBug>
__global__ void writes_past_the_end(float* out, int n) {  // [n]
  if (int(threadIdx.x) < n + (kBug ? 1 : 0)) out[threadIdx.x] = 1.0f;
}

KVCACHE_PLANTED(write_past_the_end_of_a_tensor) {
  Buffer<float> out(20);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(writes_past_the_end), 1, 32, 0, nullptr, out.data(), 20), out,
                 [](size_t) { return 1; });
}

template <bool kBug>
__global__ void vectors(float* out, const float* x) {  // [4], [8]
  const float4 v = *reinterpret_cast<const float4*>(x + (kBug ? 1 : 4));
  out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}

KVCACHE_PLANTED(misaligned_vector) {
  Buffer<float> out(4), x(8, false);
  for (size_t i = 0; i < 8; ++i) x[i] = float(i);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(vectors), 1, 1, 0, nullptr, out.data(), x.data()), out,
                 [&](size_t i) { return i + (bug ? 1 : 4); });
}

template <bool kBug>
__global__ void streamed_vectors(float* out, const float* x) {  // [4], [8]
  const float4 v = load_streaming(reinterpret_cast<const float4*>(x + (kBug ? 2 : 4)));
  out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}

KVCACHE_PLANTED(misaligned_streaming_load) {
  Buffer<float> out(4), x(8, false);
  for (size_t i = 0; i < 8; ++i) x[i] = float(i);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(streamed_vectors), 1, 1, 0, nullptr, out.data(), x.data()), out,
                 [&](size_t i) { return i + (bug ? 2 : 4); });
}

template <bool kBug>
__global__ void far_page(int64_t* out, int page, int page_elements) {  // [1]
  out[0] = kBug ? int64_t(page * page_elements) : int64_t(page) * page_elements;
}

KVCACHE_PLANTED(offset_beyond_32_bits) {
  Buffer<int64_t> out(1);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(far_page), 1, 1, 0, nullptr, out.data(), 1 << 20, 1 << 12), out,
                 [](size_t) { return int64_t(1) << 32; });
}

template <bool kBug>
__global__ void ones(float* out) {  // [1]
  out[0] = 1.0f;
}

KVCACHE_PLANTED(too_many_threads) {
  Buffer<float> out(1);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(ones), 1, bug ? 1056 : 1, 0, nullptr, out.data()), out,
                 [](size_t) { return 1; });
}
KVCACHE_PLANTED(too_much_shared_memory) {
  Buffer<float> out(1);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(ones), 1, 1, bug ? 227 * 1024 + 16 : 0, nullptr, out.data()), out,
                 [](size_t) { return 1; });
}
KVCACHE_PLANTED(grid_too_high) {
  Buffer<float> out(1);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(ones), dim3(1, bug ? 65536 : 1), 1, 0, nullptr, out.data()), out,
                 [](size_t) { return 1; });
}
KVCACHE_PLANTED(grid_of_nothing) {
  Buffer<float> out(1);
  return verdict(KVCACHE_LAUNCH(KVCACHE_PICK(ones), bug ? 0 : 1, 1, 0, nullptr, out.data()), out,
                 [](size_t) { return 1; });
}

}  // namespace
}  // namespace kvcache::cuda::planted
