// One 16-lane register.
#pragma once

#include <immintrin.h>

#define QUIRE_ISA avx512

namespace quire::avx512 {

constexpr int kTileRows = 6, kTileColumns = 4, kScoreBlocks = 4, kValueBlocks = 4;

struct F16 {
    __m512 all;
};

#include "lanes_halves.h"

QUIRE_INLINE F16 broadcast(float a) { return {_mm512_set1_ps(a)}; }

QUIRE_INLINE F16 widen(__m256i a) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16))};
}
QUIRE_INLINE __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1); }

QUIRE_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
QUIRE_INLINE F16 load(const bf16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
QUIRE_INLINE F16 load_first(const float* p, int64_t n) {
    return {_mm512_maskz_loadu_ps(first(n), p)};
}
QUIRE_INLINE F16 load_first(const bf16* p, int64_t n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p));
}

QUIRE_INLINE void store(float* p, F16 a) { _mm512_storeu_ps(p, a.all); }
QUIRE_INLINE void store_first(float* p, F16 a, int64_t n) {
    _mm512_mask_storeu_ps(p, first(n), a.all);
}

QUIRE_INLINE F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.all, b.all)}; }
QUIRE_INLINE F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.all, b.all)}; }
QUIRE_INLINE F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.all, b.all)}; }
QUIRE_INLINE F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.all, b.all)}; }
QUIRE_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.all, b.all, c.all)}; }
QUIRE_INLINE F16 larger(F16 a, F16 b) { return {_mm512_max_ps(a.all, b.all)}; }
QUIRE_INLINE F16 if_less(F16 a, F16 b, F16 x, F16 y) {
    __mmask16 less = _mm512_cmp_ps_mask(a.all, b.all, _CMP_LT_OQ);
    return {_mm512_mask_blend_ps(less, y.all, x.all)};
}

QUIRE_INLINE F16 power_of_two(F16 t) {
    __m512i biased = _mm512_add_epi32(_mm512_castps_si512(t.all), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}

QUIRE_INLINE float reduce_sum(F16 a) {
    __m256 low = _mm512_castps512_ps256(a.all), high = _mm512_extractf32x8_ps(a.all, 1);
    return reduce_sum_8(_mm256_add_ps(low, high));
}
QUIRE_INLINE float reduce_larger(F16 a) {
    __m256 low = _mm512_castps512_ps256(a.all), high = _mm512_extractf32x8_ps(a.all, 1);
    return reduce_larger_8(_mm256_max_ps(low, high));
}

}  // namespace quire::avx512
