// F16: sixteen fp32 lanes, the only vector type of the kernels, with one meaning on every
// instruction set. Each operation is one IEEE operation per lane, so equal code gives equal bits.
//
//   load(p), load_first(p, n)    16 elements of fp32 or bf16, or n of them and zeros
//   store(p, a), store_first(p, a, n)
//   a + b, a - b, a * b, a / b, fma(a, b, c) = a * b + c rounded once
//   larger(a, b)                 a > b ? a : b, hence b where either is NaN
//   if_less(a, b, x, y)          a < b ? x : y
//   power_of_two(t)              2^n where t = 1.5 * 2^23 + n, n in -126..127
//   reduce_sum, reduce_larger    lanes j and j + 8 first, then + 4, + 2, + 1
#pragma once

#include "ops.h"

#define QUIRE_INLINE static inline __attribute__((always_inline))

#if defined(QUIRE_ISA_AVX512)
#include "lanes_avx512.h"
#elif defined(QUIRE_ISA_AVX2)
#include "lanes_avx2.h"
#else
#include "lanes_portable.h"
#endif
