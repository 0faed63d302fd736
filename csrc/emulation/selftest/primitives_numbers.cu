// Numbers: conversions at every border between two values of 16 bits, bit tricks, and approximations within the error
// that CUDA promises. See primitives.cu.
#include <cmath>

#include "../../cuda/ptx/convert.cuh"
#include "../../cuda/ptx/math.cuh"
#include "planted.h"

namespace kvcache::cuda::planted {
namespace {

// What the bits say, by the definition of the formats.
double value(bool bfloat, unsigned bits) {
  const int fraction_bits = bfloat ? 7 : 10, bias = bfloat ? 127 : 15, top = bfloat ? 255 : 31;
  const int exponent = int(bits >> fraction_bits) & top, fraction = int(bits & ((1u << fraction_bits) - 1));
  const double sign = bits >> 15 ? -1.0 : 1.0;
  if (exponent == top) return fraction ? std::nan("") : sign * HUGE_VAL;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits);
}

// One thread each: 16 bits to float and back; then the middle between this value and the next one, and its neighbours.
__global__ void convert_all(unsigned* out, float* wide, int bfloat) {  // [65536][4], [65536]
  const unsigned bits = blockIdx.x * blockDim.x + threadIdx.x;
  auto to = [&](uint16_t x) { return bfloat ? bf16_bits_to_float(x) : f16_bits_to_float(x); };
  auto from = [&](float x) { return unsigned(bfloat ? float_to_bf16_bits(x) : float_to_f16_bits(x)); };
  const float x = to(uint16_t(bits)), next = to(uint16_t(bits + 1)), middle = 0.5f * x + 0.5f * next;
  wide[bits] = x;
  out[bits * 4] = from(x);
  out[bits * 4 + 1] = from(middle);
  out[bits * 4 + 2] = from(nextafterf(middle, 0.0f));
  out[bits * 4 + 3] = from(nextafterf(middle, middle < 0 ? -HUGE_VALF : HUGE_VALF));
  float lo, hi;
  const uint32_t pair = bfloat ? floats_to_bf16x2(x, -x) : floats_to_f16x2(x, -x);
  f16x2_to_floats(pair, lo, hi);
  const bool nan = x != x;
  if (!nan && (pair & 0xffff) != bits) out[bits * 4] = ~0u;
  if (!nan && pair >> 16 != (bits ^ 0x8000u)) out[bits * 4] = ~1u;
  if (!nan && !bfloat && !(lo == x && hi == -x)) out[bits * 4] = ~2u;
}

std::string conversions(bool bfloat) {
  Buffer<unsigned> out(65536 * 4);
  Buffer<float> wide(65536);
  if (const int error = KVCACHE_LAUNCH(convert_all, 256, 256, 0, nullptr, out.data(), wide.data(), int(bfloat))) {
    return "CUDA error " + std::to_string(error);
  }
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const double x = value(bfloat, bits);
    const bool nan = std::isnan(x);
    if (nan ? wide[bits] == wide[bits] : double(wide[bits]) != x) return "wrong value of " + std::to_string(bits);
    if (nan ? !std::isnan(value(bfloat, out[bits * 4])) : out[bits * 4] != bits) {
      return "wrong result: " + std::to_string(bits) + " there and back is " + std::to_string(out[bits * 4]);
    }
    if (nan || std::isinf(x) || std::isinf(value(bfloat, bits + 1))) continue;
    const unsigned want[4] = {bits, bits + bits % 2, bits, bits + 1};  // ties to even
    for (int i = 1; i < 4; ++i) {
      if (out[bits * 4 + i] != want[i]) {
        return "wrong result: beside the middle of " + std::to_string(bits) + " and the next one, " +
               std::to_string(i) + ": " + std::to_string(out[bits * 4 + i]);
      }
    }
  }
  return "";
}

KVCACHE_PRIMITIVE(conversions_of_bf16) { return conversions(true); }
KVCACHE_PRIMITIVE(conversions_of_f16) { return conversions(false); }

__global__ void bit_tricks(unsigned* out, unsigned x) {  // [8]
  const unsigned all[8] = {
      unsigned(__popc(x)),        unsigned(__ffs(int(x))),
      unsigned(__clz(int(x))),    __brev(x),
      __umulhi(x, 0x9e3779b9u),   __byte_perm(x, ~x, 0x5140),
      __funnelshift_l(x, ~x, 11), __float_as_uint(__uint_as_float(x & 0x3fffffffu)) + unsigned(__float_as_int(1.0f))};
  out[threadIdx.x] = all[threadIdx.x];
}

KVCACHE_PRIMITIVE(bits) {
  for (unsigned x : {0u, 1u, 0x80000000u, 0xffffffffu, 0x12345678u, 0x00f0a010u}) {
    unsigned ones = 0, first = 0, leading = 0, mirrored = 0;
    for (unsigned b = 32; b-- > 0;) {
      if (x >> b & 1) ones++, first = b + 1;
      mirrored |= (x >> b & 1) << (31 - b);
    }
    while (leading < 32 && !(x >> (31 - leading) & 1)) ++leading;
    const unsigned bytes[8] = {x & 255,  x >> 8 & 255,  x >> 16 & 255,  x >> 24,
                               ~x & 255, ~x >> 8 & 255, ~x >> 16 & 255, ~x >> 24};
    const unsigned want[8] = {ones,
                              first,
                              leading,
                              mirrored,
                              unsigned(uint64_t(x) * 0x9e3779b9u >> 32),
                              bytes[0] | bytes[4] << 8 | bytes[1] << 16 | bytes[5] << 24,
                              ~x << 11 | x >> 21,
                              (x & 0x3fffffffu) + 0x3f800000u};
    Buffer<unsigned> out(8);
    const std::string wrong =
        verdict(KVCACHE_LAUNCH(bit_tricks, 1, 8, 0, nullptr, out.data(), x), out, [&](size_t i) { return want[i]; });
    if (!wrong.empty()) return wrong;
  }
  return "";
}

__global__ void functions(float* out) {  // [5][2000]
  const int i = int(blockIdx.x * 100 + threadIdx.x);
  const float x = float(i - 1000) * 0.05f;
  out[i] = fast_exp2(x);
  out[2000 + i] = fast_log2(float(i) * 0.01f);
  out[4000 + i] = fast_tanh(x);
  out[6000 + i] = __fdividef(x, 3.0f);
  out[8000 + i] = larger(x, 7.0f);
}

KVCACHE_PRIMITIVE(functions_of_the_special_unit) {
  Buffer<float> out(5 * 2000);
  if (const int error = KVCACHE_LAUNCH(functions, 20, 100, 0, nullptr, out.data())) return std::to_string(error);
  for (size_t i = 0; i < 2000; ++i) {
    const double x = double(float(int(i) - 1000) * 0.05f), y = double(float(i) * 0.01f);
    const double want[5] = {std::exp2(x), std::log2(y), std::tanh(x), x / 3, x > 7 ? x : 7};
    const double relative[5] = {3e-7, 3e-7, 5e-4, 2e-7, 0}, absolute[5] = {0, 3e-7, 0, 0, 0};
    for (size_t f = 0; f < 5; ++f) {
      const double got = out[f * 2000 + i];
      const bool right = got == want[f] || std::fabs(got - want[f]) <= relative[f] * std::fabs(want[f]) + absolute[f];
      if (!right) return "wrong result: function " + std::to_string(f) + " of element " + std::to_string(i);
    }
  }
  return "";
}

__global__ void edges(float* out) {  // [8]
  const float inf = __int_as_float(0x7f800000), nan = __int_as_float(0x7fc00000);
  out[0] = fast_exp2(-inf);
  out[1] = fast_exp2(-200.0f);
  out[2] = fast_log2(0.0f) == -inf;
  out[3] = larger(nan, 2.0f) + larger(3.0f, nan);
  out[4] = fmaxf(nan, 1.0f) + fminf(1.0f, nan);
  out[5] = max(-1, 5) + min(2.0f, -2.0f);
  out[6] = fast_exp2(inf) == inf;
  out[7] = fast_tanh(inf) + fast_tanh(-50.0f);
}

KVCACHE_PRIMITIVE(functions_at_their_edges) {
  Buffer<float> out(8);
  const float want[8] = {0, 0, 1, 5, 2, 3, 1, 0};
  return verdict(KVCACHE_LAUNCH(edges, 1, 1, 0, nullptr, out.data()), out, [&](size_t i) { return want[i]; });
}

}  // namespace
}  // namespace kvcache::cuda::planted
