// Sixteen floats in an array; the compiler vectorises as far as the baseline allows.
#pragma once

#include <cstring>

#define QUIRE_ISA portable

namespace quire::portable {

// Registers are few: the tile of `linear`, and vectors held at once by attention.
constexpr int kTileRows = 2, kTileColumns = 2, kScoreBlocks = 1, kValueBlocks = 1;

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
QUIRE_INLINE float to_float(bf16 a) {
    uint32_t bits = uint32_t(a.bits) << 16;
    float r;
    std::memcpy(&r, &bits, sizeof r);
    return r;
}

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
