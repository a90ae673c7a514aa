// Two 8-lane registers.
#pragma once

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#if defined(__AVXVNNI__)
#define QUIRE_ISA avx2_vnni
#else
#define QUIRE_ISA avx2
#endif

namespace quire::QUIRE_ISA {

// Half a tile's outputs at once leave registers for more rows.
constexpr int kRegisters = 8, kColumns = 1, kTileRows = 4;

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

template <int Distance>
QUIRE_INLINE __m256 exchange_8(__m256 a) {
    if constexpr (Distance == 1) return _mm256_permute_ps(a, 0xB1);
    if constexpr (Distance == 2) return _mm256_permute_ps(a, 0x4E);
    if constexpr (Distance == 4) return _mm256_permute2f128_ps(a, a, 1);
}
template <int Distance>
QUIRE_INLINE F16 exchange(F16 a) {
    if constexpr (Distance == 8)
        return {a.high, a.low};
    else
        return {exchange_8<Distance>(a.low), exchange_8<Distance>(a.high)};
}

QUIRE_INLINE F16 load_half(const uint16_t* p) {
    auto halves = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}

QUIRE_INLINE F16 load(const int8_t* p) {
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}

struct I16 {
    __m256i low, high;
};

QUIRE_INLINE I16 broadcast_int(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
QUIRE_INLINE I16 operator+(I16 a, I16 b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
QUIRE_INLINE I16 operator-(I16 a, I16 b) {
    return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)};
}
template <int Bits>
QUIRE_INLINE I16 shift_left(I16 a) {
    return {_mm256_slli_epi32(a.low, Bits), _mm256_slli_epi32(a.high, Bits)};
}
template <int Bits>
QUIRE_INLINE I16 shift_right(I16 a) {
    return {_mm256_srai_epi32(a.low, Bits), _mm256_srai_epi32(a.high, Bits)};
}
QUIRE_INLINE I16 larger(I16 a, I16 b) {
    return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)};
}
QUIRE_INLINE I16 magnitude_bits(F16 a) {
    const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
    return {_mm256_and_si256(_mm256_castps_si256(a.low), mask),
            _mm256_and_si256(_mm256_castps_si256(a.high), mask)};
}
QUIRE_INLINE F16 to_float(I16 a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
QUIRE_INLINE I16 to_int(F16 a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
QUIRE_INLINE int32_t reduce_sum(I16 a) {
    __m256i s = _mm256_add_epi32(a.low, a.high);
    __m128i r = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    r = _mm_add_epi32(r, _mm_shuffle_epi32(r, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(r, _mm_shuffle_epi32(r, 0xB1)));
}
QUIRE_INLINE int32_t reduce_larger(I16 a) {
    __m256i s = _mm256_max_epi32(a.low, a.high);
    __m128i r = _mm_max_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    r = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(r, _mm_shuffle_epi32(r, 0xB1)));
}
QUIRE_INLINE __m256i as_words(I16 a) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(a.low, a.high), 0xD8);
}
QUIRE_INLINE void store_words(int16_t* p, I16 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), as_words(a));
}
QUIRE_INLINE void store_bytes(int8_t* p, I16 a) {
    // The low byte of every word, whatever the high one holds.
    const __m256i low = _mm256_and_si256(_mm256_set1_epi32(255), a.low);
    const __m256i high = _mm256_and_si256(_mm256_set1_epi32(255), a.high);
    const __m256i words = as_words({low, high});
    const __m256i bytes = _mm256_packus_epi16(words, words);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_castsi256_si128(_mm256_permute4x64_epi64(bytes, 0xD8)));
}

using Packed = I16;
QUIRE_INLINE Packed load_weights(const uint8_t* p) {
    auto halves = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
QUIRE_INLINE I16 and_all(I16 a, __m256i mask) {
    return {_mm256_and_si256(a.low, mask), _mm256_and_si256(a.high, mask)};
}
template <int Bits>
QUIRE_INLINE I16 shift_words_right(I16 a) {
    return {_mm256_srli_epi16(a.low, Bits), _mm256_srli_epi16(a.high, Bits)};
}

QUIRE_INLINE __m256i broadcast_4(const uint8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}
struct ByteInputs {
    static constexpr int64_t kFourBytes = 4;
    __m256i all;
    explicit ByteInputs(const uint8_t* p) : all(broadcast_4(p)) {}
};

#if defined(__AVXVNNI__)
constexpr int kPlanes16 = 2;
constexpr bool kSignedBytes = false;
using WideInputs = ByteInputs;
template <class>
QUIRE_INLINE I16 bytes_of(Packed w) { return w; }
template <class>
QUIRE_INLINE I16 low_nibbles(Packed w) { return and_all(w, _mm256_set1_epi8(15)); }
template <class>
QUIRE_INLINE I16 high_nibbles(Packed w) { return and_all(shift_words_right<4>(w), _mm256_set1_epi8(15)); }
QUIRE_INLINE I16 dot(I16 sum, const I16& w, const ByteInputs& x) {
    return {_mm256_dpbusd_avx_epi32(sum.low, w.low, x.all),
            _mm256_dpbusd_avx_epi32(sum.high, w.high, x.all)};
}
#else
constexpr int kPlanes16 = 1;
constexpr bool kSignedBytes = true;

// vpmaddubsw adds pairs of products up to 2^15 - 1 without error. Nibbles times bytes are far less;
// of bytes, at most 2 * 128 * 127, if weights are signed and lend their signs to the inputs.
struct SignedBytes {
    I16 magnitude, value;
};
QUIRE_INLINE SignedBytes signed_bytes(Packed w) {
    const __m256i offset = _mm256_set1_epi8(char(128));
    const I16 value{_mm256_xor_si256(w.low, offset), _mm256_xor_si256(w.high, offset)};
    return {{_mm256_abs_epi8(value.low), _mm256_abs_epi8(value.high)}, value};
}
QUIRE_INLINE __m256i add_products(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
    const __m256i pairs = _mm256_maddubs_epi16(unsigned_bytes, signed_bytes);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    asm("" : "+x"(sum));  // one product after the other: the compiler would keep more than fit
    return sum;
}
QUIRE_INLINE I16 dot(I16 sum, const SignedBytes& w, const ByteInputs& x) {
    return {add_products(sum.low, w.magnitude.low, _mm256_sign_epi8(x.all, w.value.low)),
            add_products(sum.high, w.magnitude.high, _mm256_sign_epi8(x.all, w.value.high))};
}
QUIRE_INLINE I16 dot(I16 sum, const I16& w, const ByteInputs& x) {
    return {add_products(sum.low, w.low, x.all), add_products(sum.high, w.high, x.all)};
}

// Bytes widened to 16 bits, times inputs of 16 bits, add up exactly.
struct Words {
    I16 even, odd;
};
struct WideInputs {
    static constexpr int64_t kFourBytes = 8;
    __m256i even, odd;
    explicit WideInputs(const uint8_t* p) : even(broadcast_4(p)), odd(broadcast_4(p + 4)) {}
};
template <class Inputs>
QUIRE_INLINE auto bytes_of(Packed w) {
    if constexpr (std::is_same_v<Inputs, WideInputs>)
        return Words{and_all(w, _mm256_set1_epi16(255)), shift_words_right<8>(w)};
    else
        return signed_bytes(w);
}
template <class Inputs>
QUIRE_INLINE auto low_nibbles(Packed w) {
    if constexpr (std::is_same_v<Inputs, WideInputs>)
        return Words{and_all(w, _mm256_set1_epi16(15)),
                     and_all(shift_words_right<8>(w), _mm256_set1_epi16(15))};
    else
        return and_all(w, _mm256_set1_epi8(15));
}
template <class Inputs>
QUIRE_INLINE auto high_nibbles(Packed w) {
    if constexpr (std::is_same_v<Inputs, WideInputs>)
        return Words{and_all(shift_words_right<4>(w), _mm256_set1_epi16(15)),
                     shift_words_right<12>(w)};
    else
        return and_all(shift_words_right<4>(w), _mm256_set1_epi8(15));
}
QUIRE_INLINE __m256i dot_8(__m256i sum, __m256i even, __m256i odd, const WideInputs& x) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, x.even));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(odd, x.odd));
    asm("" : "+x"(sum));
    return sum;
}
QUIRE_INLINE I16 dot(I16 sum, const Words& w, const WideInputs& x) {
    return {dot_8(sum.low, w.even.low, w.odd.low, x), dot_8(sum.high, w.even.high, w.odd.high, x)};
}
#endif

struct Pairs {
    F16 even, odd;
};
QUIRE_INLINE Pairs load_pairs(const bf16* p) {
    auto halves = reinterpret_cast<const __m256i*>(p);
    const __m256i a = _mm256_loadu_si256(halves), b = _mm256_loadu_si256(halves + 1);
    const __m256i mask = _mm256_set1_epi32(int32_t(0xFFFF0000));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)),
             _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(a, mask)),
             _mm256_castsi256_ps(_mm256_and_si256(b, mask))}};
}
#include "lanes_pairs.h"

QUIRE_INLINE float reduce_sum(F16 a) { return reduce_sum_8(_mm256_add_ps(a.low, a.high)); }
QUIRE_INLINE float reduce_larger(F16 a) { return reduce_larger_8(_mm256_max_ps(a.low, a.high)); }

}  // namespace quire::QUIRE_ISA
