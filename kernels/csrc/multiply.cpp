// Products of a few rows with one tile of 32 outputs. How many rows share a pass over the weights
// changes no bit: every output has its own sums. Integers add up exactly within a group; groups are
// then added in fp32, in ascending order.
#include <utility>

#include "kernels.h"

namespace quire::QUIRE_ISA {

namespace {

// f(0), f(1), ... with constants: what they index stays in registers.
template <int Count, class F>
QUIRE_INLINE void each(F f) {
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        (f(std::integral_constant<int, I>{}), ...);
    }(std::make_integer_sequence<int, Count>{});
}

template <int Rows>
QUIRE_INLINE void put(const F16 (&sum)[Rows][2], float* out, int64_t stride) {
    for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < 2; ++c) store(out + r * stride + 16 * c, sum[r][c]);
}

template <int Rows>
QUIRE_INLINE void clear(F16 (&sum)[Rows][2]) {
    for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < 2; ++c) sum[r][c] = broadcast(0.0f);
}

template <int Rows>
void multiply_f32(const Matrix& w, const uint8_t* tile, const InputTile& x, float* out,
                  int64_t stride) {
    auto inputs = reinterpret_cast<const float*>(x.values);
    auto weights = reinterpret_cast<const float*>(tile);
    F16 sum[Rows][2];
    clear(sum);
    for (int64_t k = 0; k < w.inputs; ++k, inputs += Rows, weights += 32) {
        const F16 w0 = load(weights), w1 = load(weights + 16);
        for (int r = 0; r < Rows; ++r) {
            const F16 a = broadcast(inputs[r]);
            sum[r][0] = fma(a, w0, sum[r][0]);
            sum[r][1] = fma(a, w1, sum[r][1]);
        }
    }
    put(sum, out, stride);
}

template <int Rows>
void multiply_bf16(const Matrix& w, const uint8_t* tile, const InputTile& x, float* out,
                   int64_t stride) {
    auto inputs = reinterpret_cast<const bf16*>(x.values);
    auto weights = reinterpret_cast<const bf16*>(tile);
    F16 sum[Rows][2];
    clear(sum);
    for (int64_t k = 0; k < w.inputs; k += 2, inputs += 2 * Rows, weights += 64) {
        const Pairs w0 = load_pairs(weights), w1 = load_pairs(weights + 32);
        for (int r = 0; r < Rows; ++r) {
            const Pairs a = broadcast_pair(inputs + 2 * r);
            sum[r][0] = dot(sum[r][0], w0, a);
            sum[r][1] = dot(sum[r][1], w1, a);
        }
    }
    put(sum, out, stride);
}

QUIRE_INLINE F16 load_scales(const uint8_t* p, bool as_bf16) {
    return as_bf16 ? load(reinterpret_cast<const bf16*>(p))
                   : load_half(reinterpret_cast<const uint16_t*>(p));
}

// Adds 4 * Fours inputs of every row: [rows][planes][2] sums of 16 outputs.
template <int Rows, int Planes, bool Nibbles, int Fours>
QUIRE_INLINE void add_fours(const uint8_t*& weights, const uint8_t*& inputs,
                            I16 (&sum)[Rows][Planes][2]) {
    auto add = [&](Weights w0, Weights w1, int four) __attribute__((always_inline)) {
        each<Rows * Planes>([&](auto i) __attribute__((always_inline)) {
            constexpr int r = i / Planes, p = i % Planes;
            const Inputs a = broadcast_inputs(
                reinterpret_cast<const int8_t*>(inputs + 4 * (four * Rows * Planes + i)));
            sum[r][p][0] = dot(sum[r][p][0], w0, a);
            sum[r][p][1] = dot(sum[r][p][1], w1, a);
        });
    };
    constexpr int kLoads = Nibbles ? Fours / 2 : Fours;
    each<kLoads>([&](auto i) __attribute__((always_inline)) {
        const uint8_t* at = weights + 128 * i;
        const Weights w0 = load_weights(at), w1 = load_weights(at + 64);
        if constexpr (Nibbles) {
            add(low_nibbles(w0), low_nibbles(w1), 2 * i);
            add(high_nibbles(w0), high_nibbles(w1), 2 * i + 1);
        } else {
            add(w0, w1, i);
        }
    });
    weights += 128 * kLoads;
    inputs += 4 * Fours * Rows * Planes;
}

template <int Rows, int Planes, bool Nibbles>
void multiply_integers(const Matrix& w, const uint8_t* tile, const InputTile& x, float* out,
                       int64_t stride) {
    constexpr int kZeroBits = Nibbles ? 3 : 7;  // 8 or 128 stands for 0
    const uint8_t* inputs = x.values;
    const float* scales = x.scales;
    const int32_t* sums = x.sums;
    F16 total[Rows][2];
    clear(total);
    for (int64_t g = 0; g < w.inputs; g += w.group, scales += Rows, sums += Rows) {
        F16 scale[2], offset[2];
        for (int c = 0; c < 2; ++c) scale[c] = load_scales(tile + 32 * c, w.bf16_scales);
        tile += 64;
        if (w.offsets != Offsets::none) {
            for (int c = 0; c < 2; ++c) offset[c] = load_scales(tile + 32 * c, w.bf16_scales);
            tile += 64;
        }
        I16 sum[Rows][Planes][2];
        each<Rows>([&](auto r) __attribute__((always_inline)) {
            const int32_t zero = w.offsets == Offsets::none
                                     ? -int32_t(uint32_t(sums[r]) << kZeroBits)
                                     : 0;
            for (int c = 0; c < 2; ++c) {
                sum[r][Planes - 1][c] = broadcast_int(zero);
                if constexpr (Planes == 2) sum[r][0][c] = broadcast_int(0);
            }
        });
        if (w.group == 32)
            add_fours<Rows, Planes, Nibbles, 8>(tile, inputs, sum);
        else
            for (int64_t k = 0; k < w.group; k += 64)
                add_fours<Rows, Planes, Nibbles, 16>(tile, inputs, sum);
        if (w.offsets == Offsets::zeros)
            for (int c = 0; c < 2; ++c) offset[c] = broadcast(0.0f) - offset[c] * scale[c];
        each<Rows>([&](auto r) __attribute__((always_inline)) {
            const float s = scales[r];
            for (int c = 0; c < 2; ++c) {
                I16 all = sum[r][Planes - 1][c];
                if constexpr (Planes == 2) all = all + shift_left<8>(sum[r][0][c]);
                total[r][c] = fma(to_float(all), scale[c] * broadcast(s), total[r][c]);
                if (w.offsets != Offsets::none)
                    total[r][c] = fma(offset[c], broadcast(s * float(sums[r])),
                                      total[r][c]);
            }
        });
    }
    put(total, out, stride);
}

using Multiply = void (*)(const Matrix&, const uint8_t*, const InputTile&, float*, int64_t);

// The functions for 1, 2, ... rows.
template <template <int> class Function, int... Rows>
constexpr void fill(Multiply* table, std::integer_sequence<int, Rows...>) {
    ((table[Rows] = Function<Rows + 1>::value), ...);
}

template <template <int> class Function, int Count>
struct Table {
    Multiply rows[Count];
    constexpr Table() : rows{} { fill<Function>(rows, std::make_integer_sequence<int, Count>{}); }
};

template <int Rows> struct F32Rows { static constexpr Multiply value = multiply_f32<Rows>; };
template <int Rows> struct Bf16Rows { static constexpr Multiply value = multiply_bf16<Rows>; };
template <int Rows> struct Int8Rows {
    static constexpr Multiply value = multiply_integers<Rows, 1, false>;
};
template <int Rows> struct Int8WideRows {
    static constexpr Multiply value = multiply_integers<Rows, 2, false>;
};
template <int Rows> struct Int4Rows {
    static constexpr Multiply value = multiply_integers<Rows, 1, true>;
};
template <int Rows> struct Int4WideRows {
    static constexpr Multiply value = multiply_integers<Rows, 2, true>;
};

constexpr Table<F32Rows, kTileRows> kF32;
constexpr Table<Bf16Rows, kTileRows> kBf16;
constexpr Table<Int8Rows, kTileRows> kInt8;
constexpr Table<Int8WideRows, kTileRows16> kInt8Wide;
constexpr Table<Int4Rows, kTileRows> kInt4;
constexpr Table<Int4WideRows, kTileRows16> kInt4Wide;

const Multiply* functions(const Matrix& w) {
    const bool wide = w.reads == InputFormat::int16;
    switch (w.format) {
        case WeightFormat::f32: return kF32.rows;
        case WeightFormat::bf16: return kBf16.rows;
        case WeightFormat::int8: return wide ? kInt8Wide.rows : kInt8.rows;
        default: return wide ? kInt4Wide.rows : kInt4.rows;
    }
}

}  // namespace

void multiply(const Matrix& w, int64_t tile, const InputTile& x, float* out, int64_t stride) {
    functions(w)[x.rows - 1](w, w.data + tile * w.tile_bytes, x, out, stride);
}

}  // namespace quire::QUIRE_ISA
