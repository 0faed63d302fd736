// Division by a number that is known only at run time but the same for all: a multiplication and a shift.
#pragma once
#include <cstdint>

#include "decode_plan.h"

namespace kvcache {

struct Divisor {
  int32_t value;    // 1 ..
  uint32_t factor;  // ceil(2^(31 + shift) / value) with 2^shift >= value
  uint32_t shift;

  static constexpr Divisor of(int32_t value) {
    uint32_t shift = 0;
    while ((int64_t(1) << shift) < value) ++shift;
    return {value, uint32_t(((uint64_t(1) << (31 + shift)) + value - 1) / value), shift};
  }
  // n / value for 0 <= n < 2^31: what the rounding of factor adds is less than 2^-shift <= 1 / value.
  KVCACHE_EVERYWHERE constexpr int32_t quotient(int32_t n) const {
    return int32_t(uint64_t(uint32_t(n)) * factor >> (31 + shift));
  }
};

static_assert(Divisor::of(1).quotient(INT32_MAX) == INT32_MAX);
static_assert(Divisor::of(3).quotient(INT32_MAX) == INT32_MAX / 3);
static_assert(Divisor::of(7).quotient(INT32_MAX) == INT32_MAX / 7);
static_assert(Divisor::of(48).quotient(47) == 0 && Divisor::of(48).quotient(48) == 1);
static_assert(Divisor::of(65537).quotient(65537 * 32767 - 1) == 32766);
static_assert(Divisor::of(INT32_MAX).quotient(INT32_MAX - 1) == 0);
static_assert(Divisor::of(INT32_MAX).quotient(INT32_MAX) == 1);

}  // namespace kvcache
