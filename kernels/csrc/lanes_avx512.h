// One 16-lane register.
#pragma once

#include <immintrin.h>

#if defined(__AMX_INT8__)
#define QUIRE_ISA amx_int8
#define QUIRE_MATRIX_TILES
#elif defined(__AVX512BF16__)
#define QUIRE_ISA avx512_bf16
#else
#define QUIRE_ISA avx512_vnni
#endif

namespace quire::QUIRE_ISA {

constexpr int kRegisters = 32, kColumns = 2, kTileRows = 12, kPlanes16 = 2;
constexpr bool kSignedBytes = false;

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

template <int Distance>
QUIRE_INLINE F16 exchange(F16 a) {
    if constexpr (Distance == 1) return {_mm512_permute_ps(a.all, 0xB1)};
    if constexpr (Distance == 2) return {_mm512_permute_ps(a.all, 0x4E)};
    if constexpr (Distance == 4) return {_mm512_shuffle_f32x4(a.all, a.all, 0xB1)};
    if constexpr (Distance == 8) return {_mm512_shuffle_f32x4(a.all, a.all, 0x4E)};
}

QUIRE_INLINE F16 load_half(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

QUIRE_INLINE F16 load(const int8_t* p) {
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}

struct I16 {
    __m512i all;
};
using Packed = I16;
struct ByteInputs {
    static constexpr int64_t kFourBytes = 4;
    __m512i all;
    explicit ByteInputs(const uint8_t* p) {
        int32_t four;
        __builtin_memcpy(&four, p, 4);
        all = _mm512_set1_epi32(four);
    }
};
using WideInputs = ByteInputs;

QUIRE_INLINE I16 load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
QUIRE_INLINE I16 broadcast_int(int32_t a) { return {_mm512_set1_epi32(a)}; }
QUIRE_INLINE I16 operator+(I16 a, I16 b) { return {_mm512_add_epi32(a.all, b.all)}; }
QUIRE_INLINE I16 operator-(I16 a, I16 b) { return {_mm512_sub_epi32(a.all, b.all)}; }
template <int Bits>
QUIRE_INLINE I16 shift_left(I16 a) { return {_mm512_slli_epi32(a.all, Bits)}; }
template <int Bits>
QUIRE_INLINE I16 shift_right(I16 a) { return {_mm512_srai_epi32(a.all, Bits)}; }
QUIRE_INLINE I16 larger(I16 a, I16 b) { return {_mm512_max_epi32(a.all, b.all)}; }
QUIRE_INLINE I16 magnitude_bits(F16 a) {
    return {_mm512_and_si512(_mm512_castps_si512(a.all), _mm512_set1_epi32(0x7FFFFFFF))};
}
QUIRE_INLINE F16 to_float(I16 a) { return {_mm512_cvtepi32_ps(a.all)}; }
QUIRE_INLINE I16 to_int(F16 a) { return {_mm512_cvtps_epi32(a.all)}; }
QUIRE_INLINE int32_t reduce_sum(I16 a) { return _mm512_reduce_add_epi32(a.all); }
QUIRE_INLINE int32_t reduce_larger(I16 a) { return _mm512_reduce_max_epi32(a.all); }
QUIRE_INLINE void store_words(int16_t* p, I16 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.all));
}
QUIRE_INLINE void store_bytes(int8_t* p, I16 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.all));
}

QUIRE_INLINE Packed load_weights(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
template <class>
QUIRE_INLINE I16 bytes_of(Packed w) { return w; }
template <class>
QUIRE_INLINE I16 low_nibbles(Packed w) {
    return {_mm512_and_si512(w.all, _mm512_set1_epi8(15))};
}
template <class Inputs>
QUIRE_INLINE I16 high_nibbles(Packed w) {
    return low_nibbles<Inputs>({_mm512_srli_epi16(w.all, 4)});
}
QUIRE_INLINE I16 dot(I16 sum, const I16& w, const ByteInputs& x) {
    return {_mm512_dpbusd_epi32(sum.all, w.all, x.all)};
}

#if defined(__AVX512BF16__)
struct Pairs {
    __m512bh all;
};
QUIRE_INLINE Pairs load_pairs(const bf16* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
QUIRE_INLINE Pairs broadcast_pair(const bf16* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return {(__m512bh)_mm512_set1_epi32(pair)};
}
QUIRE_INLINE F16 dot(F16 sum, Pairs w, Pairs x) {
    return {_mm512_dpbf16_ps(sum.all, w.all, x.all)};
}
#else
struct Pairs {
    F16 even, odd;
};
QUIRE_INLINE Pairs split_pairs(__m512i a) {
    const __m512i high = _mm512_set1_epi32(int32_t(0xFFFF0000));
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(a, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(a, high))}};
}
QUIRE_INLINE Pairs load_pairs(const bf16* p) { return split_pairs(_mm512_loadu_si512(p)); }
#include "lanes_pairs.h"
#endif

QUIRE_INLINE float reduce_sum(F16 a) {
    __m256 low = _mm512_castps512_ps256(a.all), high = _mm512_extractf32x8_ps(a.all, 1);
    return reduce_sum_8(_mm256_add_ps(low, high));
}
QUIRE_INLINE float reduce_larger(F16 a) {
    __m256 low = _mm512_castps512_ps256(a.all), high = _mm512_extractf32x8_ps(a.all, 1);
    return reduce_larger_8(_mm256_max_ps(low, high));
}

}  // namespace quire::QUIRE_ISA
