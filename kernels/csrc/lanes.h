// The vector types of the kernels, each with one meaning on every instruction set.
//
// F16: sixteen fp32 lanes. Each operation is one IEEE operation per lane, so equal code gives equal bits.
//
//   load(p), load_first(p, n)    16 elements of fp32 or bf16, or n of them and zeros
//   store(p, a), store_first(p, a, n)
//   a + b, a - b, a * b, a / b, fma(a, b, c) = a * b + c rounded once
//   larger(a, b)                 a > b ? a : b, hence b where either is NaN
//   if_less(a, b, x, y)          a < b ? x : y
//   power_of_two(t)              2^n where t = 1.5 * 2^23 + n, n in -126..127
//   reduce_sum, reduce_larger    lanes j and j + 8 first, then + 4, + 2, + 1
//   exchange<D>(a)               lane i takes the value of lane i xor D; D is 1, 2, 4 or 8
//   load_half(p)                 16 elements of fp16
//
// I16: sixteen int32 lanes; Packed: 64 bytes of a matrix. Inputs: four for every lane, ByteInputs
// of 8 bits, all but -128, or WideInputs of 16, or again of 8 where 16 are cut into two planes. What
// of a matrix is multiplied by them, 16 x 4 weights: bytes_of<Inputs>, low_nibbles<Inputs> and
// high_nibbles<Inputs> of a Packed. They are unsigned, except that kSignedBytes takes 128 from what
// ByteInputs are multiplied by.
//
//   Inputs(p)                    four inputs, Inputs::kFourBytes bytes
//   dot(sum, w, x)               sum + w0 x0 + w1 x1 + w2 x2 + w3 x3 per lane, modulo 2^32
//   to_int(a)                    nearest, ties to even, of |a| < 2^22
//   store_bytes(p, a)            the low byte of every lane
//   store_words(p, a)            lanes of 16 bits
//
// kRegisters: how many of these types registers hold, 0 if that is not known; kTileRows and
// kColumns: how many rows and how many of a tile's two columns of 16 outputs a product takes at
// once; kPlanes16: into how many planes inputs of 16 bits are cut.
//
// Pairs: sixteen pairs of bf16; dot(sum, w, x) = fma(w0, x0, fma(w1, x1, sum)), where vdpbf16ps
// does it with subnormal numbers taken for 0.
#pragma once

#include "ops.h"

#define QUIRE_INLINE static inline __attribute__((always_inline))

#if defined(QUIRE_ISA_AMX_INT8) || defined(QUIRE_ISA_AVX512_BF16) || defined(QUIRE_ISA_AVX512_VNNI)
#include "lanes_avx512.h"
#elif defined(QUIRE_ISA_AVX2_VNNI) || defined(QUIRE_ISA_AVX2)
#include "lanes_avx2.h"
#else
#include "lanes_portable.h"
#endif
