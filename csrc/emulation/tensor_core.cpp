#include "tensor_core.h"

#include <cstring>

#include "half.h"

namespace kvcache::emulation {

void load_matrix(uint32_t* r, int tiles, bool transposed, const void* row, const char* what, Site site) {
  if (self->lane < unsigned(8 * tiles)) {
    check_aligned(row, 16, what, site);
    if (!is_shared(row, 16)) fail(std::string(what) + " at " + text(site) + ": the row does not lie in shared memory");
    note(row, 16, Access::kRead, site);
  }
  const Slot* rows = meet(~0u, row, what, site);
  const unsigned lane = self->lane, outer = lane / 4, inner = lane % 4 * 2;
  for (int i = 0; i < tiles; ++i) {
    uint16_t pair[2];
    for (unsigned j = 0; j < 2; ++j) {
      const unsigned y = transposed ? inner + j : outer, x = transposed ? outer : inner + j;
      std::memcpy(&pair[j], value_of<const uint16_t*>(rows, i * 8 + y) + x, sizeof pair[j]);
    }
    r[i] = pair[0] | uint32_t(pair[1]) << 16;
  }
}

namespace {

struct Operands {  // of one lane; c becomes the result
  float c[4];
  uint32_t a[4], b[2];
  bool bfloat;
};

// The whole product at once: lane by lane, every operand would be converted several times.
template <float (*Convert)(uint16_t)>
void multiply(Slot* slots) {
  float a[16][16], b[16][8], c[16][8];
  for (unsigned lane = 0; lane < 32; ++lane) {
    const unsigned g = lane / 4, t = lane % 4 * 2;
    Operands mine;
    std::memcpy(&mine, slots[lane].bytes, sizeof mine);
    for (unsigned j = 0; j < 2; ++j) {
      auto half = [&](uint32_t word) { return Convert(uint16_t(word >> (16 * j))); };
      a[g][t + j] = half(mine.a[0]);
      a[g + 8][t + j] = half(mine.a[1]);
      a[g][t + 8 + j] = half(mine.a[2]);
      a[g + 8][t + 8 + j] = half(mine.a[3]);
      b[t + j][g] = half(mine.b[0]);
      b[t + 8 + j][g] = half(mine.b[1]);
      c[g][t + j] = mine.c[j];
      c[g + 8][t + j] = mine.c[2 + j];
    }
  }
  for (int y = 0; y < 16; ++y) {
    for (int k = 0; k < 16; ++k) {
      for (int x = 0; x < 8; ++x) c[y][x] += a[y][k] * b[k][x];
    }
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    const unsigned g = lane / 4, t = lane % 4 * 2;
    const float mine[4] = {c[g][t], c[g][t + 1], c[g + 8][t], c[g + 8][t + 1]};
    std::memcpy(slots[lane].bytes, mine, sizeof mine);
  }
}

}  // namespace

void mma_m16n8k16(bool bfloat, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  const Operands mine{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}, bfloat};
  const Slot* slots =
      bfloat ? meet(~0u, mine, "mma_m16n8k16", site, [](Slot* all, unsigned) { multiply<bfloat_to_float>(all); })
             : meet(~0u, mine, "mma_m16n8k16", site, [](Slot* all, unsigned) { multiply<half_to_float>(all); });
  std::memcpy(c, slots[self->lane].bytes, sizeof c);
}

}  // namespace kvcache::emulation
