// Products of a few rows with one tile of 32 outputs. How many rows and outputs share a pass over
// the weights changes no bit: every output has its own sums. Integers add up exactly within a group; groups are
// then added in fp32, in ascending order.
#include <type_traits>
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

// How many of a tile's two columns of 16 outputs are taken at once: both where registers hold what so
// many lines of inputs need, since memory is read best in one run.
constexpr int columns_of(int lines) { return 2 * lines <= kTileRows ? 2 : kColumns; }

// Calls f(c) for the tile's columns, so many at once.
template <int Columns, class F>
QUIRE_INLINE void each_columns(F f) {
    for (int c = 0; c < 2; c += Columns) f(c);
}

template <int Rows, int Columns>
QUIRE_INLINE void put(const F16 (&sum)[Rows][Columns], float* out, int64_t stride) {
    for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < Columns; ++c) store(out + r * stride + 16 * c, sum[r][c]);
}

template <int Rows, int Columns>
QUIRE_INLINE void clear(F16 (&sum)[Rows][Columns]) {
    for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < Columns; ++c) sum[r][c] = broadcast(0.0f);
}

QUIRE_INLINE void fetch(const uint8_t* at, bool to_second) {
    if (to_second)
        __builtin_prefetch(at, 0, 2);
    else
        __builtin_prefetch(at);
}

// Both columns' floats, if any are fetched.
QUIRE_INLINE void fetch_floats(const void* weights, Ahead ahead) {
    if (!ahead.bytes) return;
    auto at = static_cast<const uint8_t*>(weights) + ahead.bytes;
    fetch(at, ahead.to_second);
    fetch(at + 64, ahead.to_second);
}

template <int Rows>
void multiply_f32(const Matrix& w, const uint8_t* tile, const InputTile& x, float* out,
                  int64_t stride) {
    constexpr int kAtOnce = columns_of(Rows);
    each_columns<kAtOnce>([&](int column) __attribute__((always_inline)) {
        auto inputs = reinterpret_cast<const float*>(x.values);
        auto weights = reinterpret_cast<const float*>(tile) + 16 * column;
        const Ahead ahead = column == 0 ? x.ahead : Ahead{};
        F16 sum[Rows][kAtOnce];
        clear(sum);
        for (int64_t k = 0; k < w.inputs; ++k, inputs += Rows, weights += 32) {
            fetch_floats(weights, ahead);
            F16 wide[kAtOnce];
            for (int c = 0; c < kAtOnce; ++c) wide[c] = load(weights + 16 * c);
            for (int r = 0; r < Rows; ++r) {
                const F16 a = broadcast(inputs[r]);
                for (int c = 0; c < kAtOnce; ++c) sum[r][c] = fma(a, wide[c], sum[r][c]);
            }
        }
        put(sum, out + 16 * column, stride);
    });
}

template <int Rows>
void multiply_bf16(const Matrix& w, const uint8_t* tile, const InputTile& x, float* out,
                   int64_t stride) {
    constexpr int kAtOnce = columns_of(Rows);
    each_columns<kAtOnce>([&](int column) __attribute__((always_inline)) {
        auto inputs = reinterpret_cast<const bf16*>(x.values);
        auto weights = reinterpret_cast<const bf16*>(tile) + 32 * column;
        const Ahead ahead = column == 0 ? x.ahead : Ahead{};
        F16 sum[Rows][kAtOnce];
        clear(sum);
        for (int64_t k = 0; k < w.inputs; k += 2, inputs += 2 * Rows, weights += 64) {
            fetch_floats(weights, ahead);
            Pairs pairs[kAtOnce];
            for (int c = 0; c < kAtOnce; ++c) pairs[c] = load_pairs(weights + 32 * c);
            for (int r = 0; r < Rows; ++r) {
                const Pairs a = broadcast_pair(inputs + 2 * r);
                for (int c = 0; c < kAtOnce; ++c) sum[r][c] = dot(sum[r][c], pairs[c], a);
            }
        }
        put(sum, out + 16 * column, stride);
    });
}

QUIRE_INLINE F16 load_scales(const uint8_t* p, bool as_bf16) {
    return as_bf16 ? load(reinterpret_cast<const bf16*>(p))
                   : load_half(reinterpret_cast<const uint16_t*>(p));
}

// What is fetched with every step of four inputs.
enum class StepFetches { none, to_first, to_second };

// Enough lines (a row's planes) to keep the multipliers busy until the first one's sum is there. Of
// more, the sums of a group all end at once, and nothing is left to multiply while they are stored.
constexpr int kBlockLines = kRegisters >= 32 ? 6 : 2 * kTileRows;

// Adds 4 * Fours inputs of `Lines` of a tile's `All` lines: [lines][columns] sums of 16 outputs. The
// weights that each step fetches are `ahead` bytes further on.
template <class Inputs, int Fours, int All, bool Nibbles, StepFetches Fetches, int Lines, int Columns>
QUIRE_INLINE void add_fours(const uint8_t* weights, const uint8_t* inputs,
                            [[maybe_unused]] int64_t ahead, I16 (&sum)[Lines][Columns]) {
    auto add = [&](const auto (&w)[Columns], int four) __attribute__((always_inline)) {
        each<Lines>([&](auto line) __attribute__((always_inline)) {
            const Inputs a(inputs + Inputs::kFourBytes * (four * All + line));
            for (int c = 0; c < Columns; ++c) sum[line][c] = dot(sum[line][c], w[c], a);
        });
    };
    each_load<Nibbles ? Fours / 2 : Fours>([&](auto i) __attribute__((always_inline)) {
        if constexpr (Fetches != StepFetches::none)
            for (int c = 0; c < Columns; ++c)
                fetch(weights + 128 * i + 64 * c + ahead, Fetches == StepFetches::to_second);
        Packed packed[Columns];
        for (int c = 0; c < Columns; ++c) packed[c] = load_weights(weights + 128 * i + 64 * c);
        if constexpr (Nibbles) {
            decltype(low_nibbles<Inputs>(packed[0])) w[Columns];
            for (int c = 0; c < Columns; ++c) w[c] = low_nibbles<Inputs>(packed[c]);
            add(w, 2 * i);
            for (int c = 0; c < Columns; ++c) w[c] = high_nibbles<Inputs>(packed[c]);
            add(w, 2 * i + 1);
        } else {
            decltype(bytes_of<Inputs>(packed[0])) w[Columns];
            for (int c = 0; c < Columns; ++c) w[c] = bytes_of<Inputs>(packed[c]);
            add(w, i);
        }
    });
}

// What is added to the outputs for each unit of a row's inputs: the offsets of a group's weights.
QUIRE_INLINE void load_offsets(const Matrix& w, const uint8_t* offsets, const F16 (&scale)[2],
                               F16 (&offset)[2]) {
    for (int c = 0; c < 2; ++c) {
        offset[c] = load_scales(offsets + 32 * c, w.bf16_scales);
        if (w.offsets == Offsets::zeros) offset[c] = broadcast(0.0f) - offset[c] * scale[c];
    }
}

// One column's, or both columns', sums over a group: [rows][columns], from `factor` times `starts`
// [rows] on, modulo 2^32.
template <class Inputs, int Rows, int All, int Planes, bool Nibbles, StepFetches Fetches, int Columns>
QUIRE_INLINE void sum_group(int64_t group, const uint8_t* weights, const uint8_t* inputs,
                            int64_t ahead, const int32_t* starts, int32_t factor,
                            I16 (&sum)[Rows * Planes][Columns]) {
    each<Rows>([&](auto r) __attribute__((always_inline)) {
        for (int c = 0; c < Columns; ++c) {
            sum[r * Planes + Planes - 1][c] =
                broadcast_int(int32_t(uint32_t(factor) * uint32_t(starts[r])));
            if constexpr (Planes == 2) sum[r * 2][c] = broadcast_int(0);
        }
    });
    constexpr int kAll = All * Planes;
    // Not a loop where it is one round: its sums stay in registers.
    if (group == 32) return add_fours<Inputs, 8, kAll, Nibbles, Fetches>(weights, inputs, ahead, sum);
    if (group == 64) return add_fours<Inputs, 16, kAll, Nibbles, Fetches>(weights, inputs, ahead, sum);
    for (int64_t k = 0; k < group; k += 64) {
        add_fours<Inputs, 16, kAll, Nibbles, Fetches>(weights, inputs, ahead, sum);
        weights += 128 * (Nibbles ? 8 : 16);
        inputs += Inputs::kFourBytes * 16 * kAll;
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

// Where a group's products fill many registers, they are one run of instructions, and what is to go to
// the first cache is named at its beginning. Elsewhere it is named step by step.
constexpr bool kFetchesByStep = kRegisters < 32;

// The sums of floats stand in `out`: registers hold those of integers.
template <class Inputs, int Rows, int Planes, bool Nibbles, StepFetches Fetches>
QUIRE_INLINE void multiply_groups(const Matrix& w, const uint8_t* tile, const InputTile& x,
                                  float* out, int64_t stride) {
    constexpr int kAtOnce = columns_of(Rows * Planes * Inputs::kFourBytes / 4);
    const int64_t group_bytes = w.group / (Nibbles ? 8 : 4) * 128;
    const bool centred = w.offsets == Offsets::none;
    // Sums of inputs stand there with the factor that takes away what weights are stored too large by.
    constexpr bool kSigned = kSignedBytes && !Nibbles && std::is_same_v<Inputs, ByteInputs>;
    const int32_t start_factor = kSigned ? (centred ? 0 : 128) : (centred ? 1 : 0);
    const uint8_t* inputs = x.values;
    const float* scales = x.scales;
    const int32_t* sums = x.sums;
    const int64_t ahead = x.ahead.bytes;
    for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < 2; ++c) store(out + r * stride + 16 * c, broadcast(0.0f));
    for (int64_t g = 0; g < w.inputs; g += w.group, scales += Rows, sums += Rows) {
        F16 scale[2], offset[2];
        for (int c = 0; c < 2; ++c) scale[c] = load_scales(tile + 32 * c, w.bf16_scales);
        tile += 64;
        if (!centred) {
            load_offsets(w, tile, scale, offset);
            tile += 64;
        }
        each_columns<kAtOnce>([&](int column) __attribute__((always_inline)) {
            each_block<Rows, Planes>([&]<int First, int Count>() __attribute__((always_inline)) {
                if (Fetches == StepFetches::none && column == 0 && ahead) {
                    const uint8_t* end = tile + ahead + group_bytes * (First + Count) / Rows;
                    for (auto at = tile + ahead + group_bytes * First / Rows; at < end; at += 64)
                        __builtin_prefetch(at);
                }
                I16 sum[Count * Planes][kAtOnce];
                sum_group<Inputs, Count, Rows, Planes, Nibbles, Fetches>(
                    w.group, tile + 64 * column, inputs + Inputs::kFourBytes * First * Planes,
                    ahead, sums + First, start_factor, sum);
                each<Count>([&](auto r) __attribute__((always_inline)) {
                    const F16 s = broadcast(scales[First + r]);
                    for (int c = 0; c < kAtOnce; ++c) {
                        I16 all = sum[r * Planes + Planes - 1][c];
                        if constexpr (Planes == 2) all = all + shift_left<8>(sum[r * 2][c]);
                        float* at = out + (First + r) * stride + 16 * (column + c);
                        F16 total = fma(to_float(all), scale[column + c] * s, load(at));
                        if (!centred) {
                            const float all_inputs = scales[First + r] * float(sums[First + r]);
                            total = fma(offset[column + c], broadcast(all_inputs), total);
                        }
                        store(at, total);
                    }
                });
            });
        });
        tile += group_bytes;
        inputs += w.group / 4 * Inputs::kFourBytes * Rows * Planes;
    }
}

template <class Inputs, int Rows, int Planes, bool Nibbles>
void multiply_integers(const Matrix& w, const uint8_t* tile, const InputTile& x, float* out,
                       int64_t stride) {
    const auto run = [&]<StepFetches Fetches>() __attribute__((always_inline)) {
        multiply_groups<Inputs, Rows, Planes, Nibbles, Fetches>(w, tile, x, out, stride);
    };
    if constexpr (Rows == 1)
        if (x.ahead.to_second) return run.template operator()<StepFetches::to_second>();
    if constexpr (kFetchesByStep)
        if (x.ahead.bytes) return run.template operator()<StepFetches::to_first>();
    run.template operator()<StepFetches::none>();
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
    static constexpr Multiply value = multiply_integers<ByteInputs, Rows, 1, false>;
};
template <int Rows> struct Int8WideRows {
    static constexpr Multiply value = multiply_integers<WideInputs, Rows, kPlanes16, false>;
};
template <int Rows> struct Int4Rows {
    static constexpr Multiply value = multiply_integers<ByteInputs, Rows, 1, true>;
};
template <int Rows> struct Int4WideRows {
    static constexpr Multiply value = multiply_integers<WideInputs, Rows, kPlanes16, true>;
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
