// Products of a few rows with one tile of 32 outputs. How many rows and outputs share a pass over
// the weights changes no bit: every output has its own sums. Integers add up exactly within a group; groups are
// then added in fp32, in ascending order.
#include <utility>

#include "kernels.h"

namespace quire::QUIRE_ISA {

namespace {

#if defined(QUIRE_SANITIZED)
constexpr bool kUnrolls = false;
#else
constexpr bool kUnrolls = kRegisters > 0;
#endif

// f(0), f(1), ... with constants: what they index stays in registers.
template <int Count, class F>
QUIRE_INLINE void each(F f) {
    if constexpr (!kUnrolls)
        for (int i = 0; i < Count; ++i) f(i);
    else
        [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
            (f(std::integral_constant<int, I>{}), ...);
        }(std::make_integer_sequence<int, Count>{});
}

// The same for loads of weights. With few registers, what the compiler would load ahead of its use
// in an unrolled loop goes to the stack and back.
template <int Count, class F>
QUIRE_INLINE void each_load(F f) {
    if constexpr (kRegisters >= 32)
        each<Count>(f);
    else
#pragma GCC unroll 1
        for (int i = 0; i < Count; ++i) f(i);
}

// Calls f(c) for the tile's columns of 16 outputs, as many at once as registers hold sums of.
template <class F>
QUIRE_INLINE void each_columns(F f) {
    for (int c = 0; c < 2; c += kColumns) f(c);
}

template <int Rows>
QUIRE_INLINE void put(const F16 (&sum)[Rows][kColumns], float* out, int64_t stride) {
    for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < kColumns; ++c) store(out + r * stride + 16 * c, sum[r][c]);
}

template <int Rows, int Columns>
QUIRE_INLINE void clear(F16 (&sum)[Rows][Columns]) {
    for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < Columns; ++c) sum[r][c] = broadcast(0.0f);
}

// Both columns' floats `ahead` bytes further on, if that is not 0.
QUIRE_INLINE void fetch_floats(const void* weights, int64_t ahead) {
    if (!ahead) return;
    auto at = static_cast<const uint8_t*>(weights) + ahead;
    __builtin_prefetch(at);
    __builtin_prefetch(at + 64);
}

template <int Rows>
void multiply_f32(const Matrix& w, const uint8_t* tile, const InputTile& x, float* out,
                  int64_t stride) {
    each_columns([&](int column) __attribute__((always_inline)) {
        auto inputs = reinterpret_cast<const float*>(x.values);
        auto weights = reinterpret_cast<const float*>(tile) + 16 * column;
        const int64_t ahead = column == 0 ? x.ahead : 0;
        F16 sum[Rows][kColumns];
        clear(sum);
        for (int64_t k = 0; k < w.inputs; ++k, inputs += Rows, weights += 32) {
            fetch_floats(weights, ahead);
            F16 wide[kColumns];
            for (int c = 0; c < kColumns; ++c) wide[c] = load(weights + 16 * c);
            for (int r = 0; r < Rows; ++r) {
                const F16 a = broadcast(inputs[r]);
                for (int c = 0; c < kColumns; ++c) sum[r][c] = fma(a, wide[c], sum[r][c]);
            }
        }
        put(sum, out + 16 * column, stride);
    });
}

template <int Rows>
void multiply_bf16(const Matrix& w, const uint8_t* tile, const InputTile& x, float* out,
                   int64_t stride) {
    each_columns([&](int column) __attribute__((always_inline)) {
        auto inputs = reinterpret_cast<const bf16*>(x.values);
        auto weights = reinterpret_cast<const bf16*>(tile) + 32 * column;
        const int64_t ahead = column == 0 ? x.ahead : 0;
        F16 sum[Rows][kColumns];
        clear(sum);
        for (int64_t k = 0; k < w.inputs; k += 2, inputs += 2 * Rows, weights += 64) {
            fetch_floats(weights, ahead);
            Pairs pairs[kColumns];
            for (int c = 0; c < kColumns; ++c) pairs[c] = load_pairs(weights + 32 * c);
            for (int r = 0; r < Rows; ++r) {
                const Pairs a = broadcast_pair(inputs + 2 * r);
                for (int c = 0; c < kColumns; ++c) sum[r][c] = dot(sum[r][c], pairs[c], a);
            }
        }
        put(sum, out + 16 * column, stride);
    });
}

QUIRE_INLINE F16 load_scales(const uint8_t* p, bool as_bf16) {
    return as_bf16 ? load(reinterpret_cast<const bf16*>(p))
                   : load_half(reinterpret_cast<const uint16_t*>(p));
}

// Enough lines (a row's planes) to keep the multipliers busy until the first one's sum is there. Of
// more, the sums of a group all end at once, and nothing is left to multiply while they are stored.
constexpr int kBlockLines = kRegisters >= 32 ? 6 : 2 * kTileRows;

// Adds 4 * Fours inputs of `Lines` of a tile's `All` lines: [lines][columns] sums of 16 outputs.
template <int Lines, int All, bool Nibbles, int Fours>
QUIRE_INLINE void add_fours(const uint8_t* weights, const uint8_t* inputs,
                            I16 (&sum)[Lines][kColumns]) {
    auto add = [&](const Weights (&w)[kColumns], int four) __attribute__((always_inline)) {
        each<Lines>([&](auto line) __attribute__((always_inline)) {
            const Inputs a = broadcast_inputs(inputs + kFourBytes * (four * All + line));
            for (int c = 0; c < kColumns; ++c) sum[line][c] = dot(sum[line][c], w[c], a);
        });
    };
    each_load<Nibbles ? Fours / 2 : Fours>([&](auto i) __attribute__((always_inline)) {
        Packed packed[kColumns];
        for (int c = 0; c < kColumns; ++c) packed[c] = load_weights(weights + 128 * i + 64 * c);
        Weights w[kColumns];
        if constexpr (Nibbles) {
            for (int c = 0; c < kColumns; ++c) w[c] = low_nibbles(packed[c]);
            add(w, 2 * i);
            for (int c = 0; c < kColumns; ++c) w[c] = high_nibbles(packed[c]);
            add(w, 2 * i + 1);
        } else {
            for (int c = 0; c < kColumns; ++c) w[c] = bytes_of(packed[c]);
            add(w, i);
        }
    });
}

// What the offsets of a group's weights add to the outputs.
QUIRE_INLINE void add_offsets(const Matrix& w, const uint8_t* offsets, const F16 (&scale)[2],
                              int64_t rows, const float* scales, const int32_t* sums, float* out,
                              int64_t stride) {
    F16 offset[2];
    for (int c = 0; c < 2; ++c) {
        offset[c] = load_scales(offsets + 32 * c, w.bf16_scales);
        if (w.offsets == Offsets::zeros) offset[c] = broadcast(0.0f) - offset[c] * scale[c];
    }
    for (int64_t r = 0; r < rows; ++r) {
        const F16 s = broadcast(scales[r] * float(sums[r]));
        for (int c = 0; c < 2; ++c) {
            float* at = out + r * stride + 16 * c;
            store(at, fma(offset[c], s, load(at)));
        }
    }
}

// One column's, or both columns', sums over a group: [rows][columns], from `starts` [rows] on.
template <int Rows, int All, int Planes, bool Nibbles>
QUIRE_INLINE void sum_group(int64_t group, const uint8_t* weights, const uint8_t* inputs,
                            const int32_t* starts, I16 (&sum)[Rows * Planes][kColumns]) {
    each<Rows>([&](auto r) __attribute__((always_inline)) {
        for (int c = 0; c < kColumns; ++c) {
            sum[r * Planes + Planes - 1][c] = broadcast_int(starts[r]);
            if constexpr (Planes == 2) sum[r * 2][c] = broadcast_int(0);
        }
    });
    constexpr int kLines = Rows * Planes, kAll = All * Planes;
    // Not a loop where it is one round: its sums stay in registers.
    if (group == 32) return add_fours<kLines, kAll, Nibbles, 8>(weights, inputs, sum);
    if (group == 64) return add_fours<kLines, kAll, Nibbles, 16>(weights, inputs, sum);
    for (int64_t k = 0; k < group; k += 64) {
        add_fours<kLines, kAll, Nibbles, 16>(weights, inputs, sum);
        weights += 128 * (Nibbles ? 8 : 16);
        inputs += kFourBytes * 16 * kAll;
    }
}

// Calls f.operator()<first, count>() for a tile's rows, as few at once as keep multipliers busy.
template <int Rows, int Planes, int First = 0, class F>
QUIRE_INLINE void each_block(F f) {
    constexpr int kMost = kBlockLines / Planes, kLeft = Rows - First;
    constexpr int kCount = ceil_div(kLeft, ceil_div(kLeft, kMost));
    f.template operator()<First, kCount>();
    if constexpr (kCount < kLeft) each_block<Rows, Planes, First + kCount>(f);
}

// The sums of floats stand in `out`: registers hold those of integers.
template <int Rows, int Planes, bool Nibbles>
void multiply_integers(const Matrix& w, const uint8_t* tile, const InputTile& x, float* out,
                       int64_t stride) {
    static constexpr int32_t kNoStarts[Rows] = {};
    const int64_t group_bytes = w.group / (Nibbles ? 8 : 4) * 128;
    const bool centred = w.offsets == Offsets::none;
    const uint8_t* inputs = x.values;
    const float* scales = x.scales;
    const int32_t* sums = x.sums;
    for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < 2; ++c) store(out + r * stride + 16 * c, broadcast(0.0f));
    for (int64_t g = 0; g < w.inputs; g += w.group, scales += Rows, sums += Rows) {
        F16 scale[2];
        for (int c = 0; c < 2; ++c) scale[c] = load_scales(tile + 32 * c, w.bf16_scales);
        tile += 64;
        const uint8_t* offsets = tile;
        if (!centred) tile += 64;
        const int32_t* starts = centred ? sums : kNoStarts;
        each_columns([&](int column) __attribute__((always_inline)) {
            each_block<Rows, Planes>([&]<int First, int Count>() __attribute__((always_inline)) {
                if (column == 0 && x.ahead) {
                    const uint8_t* end = tile + x.ahead + group_bytes * (First + Count) / Rows;
                    for (auto at = tile + x.ahead + group_bytes * First / Rows; at < end; at += 64)
                        __builtin_prefetch(at);
                }
                I16 sum[Count * Planes][kColumns];
                sum_group<Count, Rows, Planes, Nibbles>(
                    w.group, tile + 64 * column, inputs + kFourBytes * First * Planes,
                    starts + First, sum);
                each<Count>([&](auto r) __attribute__((always_inline)) {
                    const F16 s = broadcast(scales[First + r]);
                    for (int c = 0; c < kColumns; ++c) {
                        I16 all = sum[r * Planes + Planes - 1][c];
                        if constexpr (Planes == 2) all = all + shift_left<8>(sum[r * 2][c]);
                        float* at = out + (First + r) * stride + 16 * (column + c);
                        store(at, fma(to_float(all), scale[column + c] * s, load(at)));
                    }
                });
            });
        });
        if (!centred) add_offsets(w, offsets, scale, Rows, scales, sums, out, stride);
        tile += group_bytes;
        inputs += w.group / 4 * kFourBytes * Rows * Planes;
    }
}

using Multiply = void (*)(const Matrix&, const uint8_t*, const InputTile&, float*, int64_t);

#if defined(QUIRE_MATRIX_TILES)
#include "matrix_tiles.h"

Multiply in_tiles(const Matrix& w) {
    const bool wide = w.reads == InputFormat::int16;
    if (w.format == WeightFormat::int8)
        return wide ? multiply_in_tiles<2, false> : multiply_in_tiles<1, false>;
    return wide ? multiply_in_tiles<2, true> : multiply_in_tiles<1, true>;
}
#endif

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
    static constexpr Multiply value = multiply_integers<Rows, kPlanes16, false>;
};
template <int Rows> struct Int4Rows {
    static constexpr Multiply value = multiply_integers<Rows, 1, true>;
};
template <int Rows> struct Int4WideRows {
    static constexpr Multiply value = multiply_integers<Rows, kPlanes16, true>;
};

constexpr Table<F32Rows, kTileRows> kF32;
constexpr Table<Bf16Rows, kTileRows> kBf16;
constexpr int rows_in_lanes(InputFormat format) {
    return kMatrixTiles ? kLeastRowsInTiles - 1 : tile_rows(format);
}
constexpr int kRows8 = rows_in_lanes(InputFormat::int8), kRows16 = rows_in_lanes(InputFormat::int16);
constexpr Table<Int8Rows, kRows8> kInt8;
constexpr Table<Int8WideRows, kRows16> kInt8Wide;
constexpr Table<Int4Rows, kRows8> kInt4;
constexpr Table<Int4WideRows, kRows16> kInt4Wide;

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
#if defined(QUIRE_MATRIX_TILES)
    if (in_matrix_tiles(w.reads, x.rows))
        return in_tiles(w)(w, w.data + tile * w.tile_bytes, x, out, stride);
#endif
    functions(w)[x.rows - 1](w, w.data + tile * w.tile_bytes, x, out, stride);
}

}  // namespace quire::QUIRE_ISA
