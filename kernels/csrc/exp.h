// exp(x) for x <= 0, by one polynomial on every instruction set.
//
// x = n ln2 + r with n the nearest integer, |r| <= ln2 / 2; exp(x) = 2^n * sum of r^i / i! up to
// i = 7 (truncation below 6e-9) by fused multiply-adds. ln2 is split in two so that n * kLn2High is
// exact. Relative error below 2e-7. Where exp(x) < 2^-126 the result is 0;
// exp(0) = 1 exactly; NaN gives NaN.
#pragma once

#include "lanes.h"

namespace quire::QUIRE_ISA {

QUIRE_INLINE F16 exp_negative(F16 x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer
    constexpr float kLog2E = 1.44269504f, kLn2High = 0x1.62ep-1f, kLn2Low = 0x1.0bfbe8p-15f;
    constexpr float kLowest = -87.33654f;
    const F16 t = fma(x, broadcast(kLog2E), broadcast(kRound));
    const F16 n = t - broadcast(kRound);
    const F16 r = fma(n, broadcast(-kLn2Low), fma(n, broadcast(-kLn2High), x));
    constexpr float kFactors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    F16 sum = broadcast(1.0f / 5040);
    for (float factor : kFactors) sum = fma(sum, r, broadcast(factor));
    return if_less(x, broadcast(kLowest), broadcast(0.0f), sum * power_of_two(t));
}

}  // namespace quire::QUIRE_ISA
