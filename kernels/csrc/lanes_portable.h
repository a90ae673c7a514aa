// Sixteen floats in an array; the compiler vectorises as far as the baseline allows.
#pragma once

#include <cstring>

#define QUIRE_ISA portable

namespace quire::portable {

constexpr int kRegisters = 0, kColumns = 1, kTileRows = 4, kPlanes16 = 1;
constexpr bool kSignedBytes = false;

struct F16 {
    float lane[16];
};

template <class Op>
QUIRE_INLINE F16 each_lane(Op op) {
    F16 r;
    for (int i = 0; i < 16; ++i) r.lane[i] = op(i);
    return r;
}

QUIRE_INLINE float to_float(float a) { return a; }
QUIRE_INLINE float to_float(bf16 a) { return to_f32(a); }

QUIRE_INLINE F16 broadcast(float a) { return each_lane([=](int) { return a; }); }

template <class T>
QUIRE_INLINE F16 load(const T* p) { return each_lane([=](int i) { return to_float(p[i]); }); }

template <class T>
QUIRE_INLINE F16 load_first(const T* p, int64_t n) {
    return each_lane([=](int i) { return i < n ? to_float(p[i]) : 0.0f; });
}

QUIRE_INLINE void store(float* p, const F16& a) { std::memcpy(p, a.lane, sizeof a.lane); }
QUIRE_INLINE void store_first(float* p, const F16& a, int64_t n) {
    std::memcpy(p, a.lane, size_t(n) * sizeof(float));
}

QUIRE_INLINE F16 operator+(const F16& a, const F16& b) {
    return each_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
QUIRE_INLINE F16 operator-(const F16& a, const F16& b) {
    return each_lane([&](int i) { return a.lane[i] - b.lane[i]; });
}
QUIRE_INLINE F16 operator*(const F16& a, const F16& b) {
    return each_lane([&](int i) { return a.lane[i] * b.lane[i]; });
}
QUIRE_INLINE F16 operator/(const F16& a, const F16& b) {
    return each_lane([&](int i) { return a.lane[i] / b.lane[i]; });
}
QUIRE_INLINE F16 fma(const F16& a, const F16& b, const F16& c) {
    return each_lane([&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
}
QUIRE_INLINE F16 larger(const F16& a, const F16& b) {
    return each_lane([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
QUIRE_INLINE F16 if_less(const F16& a, const F16& b, const F16& x, const F16& y) {
    return each_lane([&](int i) { return a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i]; });
}

QUIRE_INLINE F16 power_of_two(const F16& t) {
    F16 r;
    for (int i = 0; i < 16; ++i) {
        uint32_t bits;
        std::memcpy(&bits, &t.lane[i], sizeof bits);
        bits = (bits + 127) << 23;
        std::memcpy(&r.lane[i], &bits, sizeof bits);
    }
    return r;
}

template <int Distance>
QUIRE_INLINE F16 exchange(const F16& a) {
    return each_lane([&](int i) { return a.lane[i ^ Distance]; });
}

// fp16 to fp32, exact.
QUIRE_INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7FFF;
    uint32_t bits = (magnitude << 13) + (112u << 23);
    float r;
    if (magnitude >= 0x7C00) bits = (magnitude << 13) | 0x7F800000;
    if (magnitude < 0x0400) {
        r = float(magnitude) * 0x1p-24f;
        std::memcpy(&bits, &r, sizeof bits);
    }
    bits |= sign;
    std::memcpy(&r, &bits, sizeof r);
    return r;
}
QUIRE_INLINE F16 load_half(const uint16_t* p) {
    return each_lane([=](int i) { return half_to_float(p[i]); });
}
QUIRE_INLINE F16 load(const int8_t* p) { return each_lane([=](int i) { return float(p[i]); }); }

struct I16 {
    int32_t lane[16];
};
template <class Op>
QUIRE_INLINE I16 each_int(Op op) {
    I16 r;
    for (int i = 0; i < 16; ++i) r.lane[i] = int32_t(op(i));
    return r;
}
struct Packed {
    uint8_t byte[64];
};
struct ByteInputs {
    static constexpr int64_t kFourBytes = 4;
    int8_t each[4];
    explicit ByteInputs(const uint8_t* p) { std::memcpy(each, p, sizeof each); }
};
struct WideInputs {
    static constexpr int64_t kFourBytes = 8;
    int16_t each[4];  // as put_words leaves them: 0, 2, 1, 3
    explicit WideInputs(const uint8_t* p) { std::memcpy(each, p, sizeof each); }
};

QUIRE_INLINE I16 broadcast_int(int32_t a) { return each_int([=](int) { return a; }); }
QUIRE_INLINE I16 operator+(const I16& a, const I16& b) {
    return each_int([&](int i) { return uint32_t(a.lane[i]) + uint32_t(b.lane[i]); });
}
QUIRE_INLINE I16 operator-(const I16& a, const I16& b) {
    return each_int([&](int i) { return uint32_t(a.lane[i]) - uint32_t(b.lane[i]); });
}
template <int Bits>
QUIRE_INLINE I16 shift_left(const I16& a) {
    return each_int([&](int i) { return uint32_t(a.lane[i]) << Bits; });
}
template <int Bits>
QUIRE_INLINE I16 shift_right(const I16& a) {
    return each_int([&](int i) { return a.lane[i] >> Bits; });
}
QUIRE_INLINE I16 larger(const I16& a, const I16& b) {
    return each_int([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
QUIRE_INLINE I16 magnitude_bits(const F16& a) {
    I16 bits;
    std::memcpy(bits.lane, a.lane, sizeof bits.lane);
    return each_int([&](int i) { return bits.lane[i] & 0x7FFFFFFF; });
}
QUIRE_INLINE F16 to_float(const I16& a) { return each_lane([&](int i) { return float(a.lane[i]); }); }
// Adding 1.5 * 2^23 leaves the nearest integer, ties to even, of anything below 2^22.
QUIRE_INLINE I16 to_int(const F16& a) {
    return each_int([&](int i) { return (a.lane[i] + 12582912.0f) - 12582912.0f; });
}
QUIRE_INLINE int32_t reduce_sum(const I16& a) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += a.lane[i];
    return sum;
}
QUIRE_INLINE int32_t reduce_larger(const I16& a) {
    int32_t top = a.lane[0];
    for (int i = 1; i < 16; ++i) top = a.lane[i] > top ? a.lane[i] : top;
    return top;
}
QUIRE_INLINE void store_words(int16_t* p, const I16& a) {
    for (int i = 0; i < 16; ++i) p[i] = int16_t(a.lane[i]);
}
QUIRE_INLINE void store_bytes(int8_t* p, const I16& a) {
    for (int i = 0; i < 16; ++i) p[i] = int8_t(a.lane[i]);
}

QUIRE_INLINE Packed load_weights(const uint8_t* p) {
    Packed w;
    std::memcpy(w.byte, p, 64);
    return w;
}
template <class>
QUIRE_INLINE Packed bytes_of(const Packed& w) { return w; }
template <class>
QUIRE_INLINE Packed low_nibbles(Packed w) {
    for (uint8_t& byte : w.byte) byte &= 15;
    return w;
}
template <class>
QUIRE_INLINE Packed high_nibbles(Packed w) {
    for (uint8_t& byte : w.byte) byte >>= 4;
    return w;
}
QUIRE_INLINE I16 dot(const I16& sum, const Packed& w, const int32_t (&x)[4]) {
    I16 r = sum;
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 4; ++j) r.lane[i] += w.byte[4 * i + j] * x[j];
    return r;
}
QUIRE_INLINE I16 dot(const I16& sum, const Packed& w, const ByteInputs& x) {
    return dot(sum, w, {x.each[0], x.each[1], x.each[2], x.each[3]});
}
QUIRE_INLINE I16 dot(const I16& sum, const Packed& w, const WideInputs& x) {
    return dot(sum, w, {x.each[0], x.each[2], x.each[1], x.each[3]});
}

struct Pairs {
    F16 even, odd;
};
QUIRE_INLINE Pairs load_pairs(const bf16* p) {
    return {each_lane([=](int i) { return to_float(p[2 * i]); }),
            each_lane([=](int i) { return to_float(p[2 * i + 1]); })};
}
#include "lanes_pairs.h"

template <class Op>
QUIRE_INLINE float reduce(F16 a, Op op) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) a.lane[i] = op(a.lane[i], a.lane[i + half]);
    return a.lane[0];
}
QUIRE_INLINE float reduce_sum(const F16& a) {
    return reduce(a, [](float x, float y) { return x + y; });
}
QUIRE_INLINE float reduce_larger(const F16& a) {
    return reduce(a, [](float x, float y) { return x > y ? x : y; });
}

}  // namespace quire::portable
