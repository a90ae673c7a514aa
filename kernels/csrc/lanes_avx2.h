// Two 8-lane registers.
#pragma once

#include <immintrin.h>

#include <cstring>

#define QUIRE_ISA avx2

namespace quire::avx2 {

constexpr int kTileRows = 2, kTileColumns = 2, kScoreBlocks = 1, kValueBlocks = 1;

struct F16 {
    __m256 low, high;
};

#include "lanes_halves.h"

QUIRE_INLINE F16 broadcast(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }

QUIRE_INLINE __m256 widen(__m128i a) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16));
}

QUIRE_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
QUIRE_INLINE F16 load(const bf16* p) {
    auto halves = reinterpret_cast<const __m128i*>(p);
    return {widen(_mm_loadu_si128(halves)), widen(_mm_loadu_si128(halves + 1))};
}

template <class T>
QUIRE_INLINE F16 load_first(const T* p, int64_t n) {
    T padded[16] = {};
    std::memcpy(padded, p, size_t(n) * sizeof(T));
    return load(padded);
}

QUIRE_INLINE void store(float* p, F16 a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
}
QUIRE_INLINE void store_first(float* p, F16 a, int64_t n) {
    float padded[16];
    store(padded, a);
    std::memcpy(p, padded, size_t(n) * sizeof(float));
}

QUIRE_INLINE F16 operator+(F16 a, F16 b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
QUIRE_INLINE F16 operator-(F16 a, F16 b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
QUIRE_INLINE F16 operator*(F16 a, F16 b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
QUIRE_INLINE F16 operator/(F16 a, F16 b) {
    return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
QUIRE_INLINE F16 fma(F16 a, F16 b, F16 c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
QUIRE_INLINE F16 larger(F16 a, F16 b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
QUIRE_INLINE __m256 if_less_8(__m256 a, __m256 b, __m256 x, __m256 y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
QUIRE_INLINE F16 if_less(F16 a, F16 b, F16 x, F16 y) {
    return {if_less_8(a.low, b.low, x.low, y.low), if_less_8(a.high, b.high, x.high, y.high)};
}

QUIRE_INLINE __m256 power_of_two_8(__m256 t) {
    __m256i biased = _mm256_add_epi32(_mm256_castps_si256(t), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
QUIRE_INLINE F16 power_of_two(F16 t) { return {power_of_two_8(t.low), power_of_two_8(t.high)}; }

QUIRE_INLINE float reduce_sum(F16 a) { return reduce_sum_8(_mm256_add_ps(a.low, a.high)); }
QUIRE_INLINE float reduce_larger(F16 a) { return reduce_larger_8(_mm256_max_ps(a.low, a.high)); }

}  // namespace quire::avx2
