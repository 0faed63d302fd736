// ldmatrix and mma of cuda/ptx.
#pragma once
#include "scheduler.h"

namespace kvcache::emulation {

void load_matrix(uint32_t* r, int tiles, bool transposed, const void* row, const char* what, Site site);

template <int Tiles, bool Transposed>
inline void ldmatrix(uint32_t (&r)[Tiles], const void* row, const char* what, Site site) {
  load_matrix(r, Tiles, Transposed, row, what, site);
}

void mma_m16n8k16(bool bfloat, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site);

}  // namespace kvcache::emulation
