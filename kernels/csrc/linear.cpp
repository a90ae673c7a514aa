// Every output is its own accumulator over the inputs; the tile only says how many are computed at
// once from the same loads, so it has no influence on their bits.
#include "kernels.h"

namespace quire::QUIRE_ISA {

template <int Rows, int Columns, class W>
QUIRE_INLINE void tile(const Linear& a, int64_t row, int64_t column) {
    const int64_t n = a.inputs;
    const float* x = a.x + row * n;
    const W* w = static_cast<const W*>(a.weight) + column * n;
    F16 sum[Rows][Columns];
    for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < Columns; ++c) sum[r][c] = broadcast(0.0f);

    auto accumulate = [&](auto load_at) __attribute__((always_inline)) {
        F16 weights[Columns];
        for (int c = 0; c < Columns; ++c) weights[c] = load_at(w + c * n);
        for (int r = 0; r < Rows; ++r) {
            const F16 inputs = load_at(x + r * n);
            for (int c = 0; c < Columns; ++c) sum[r][c] = fma(inputs, weights[c], sum[r][c]);
        }
    };
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        accumulate([=](auto* p) __attribute__((always_inline)) { return load(p + i); });
    if (i < n)
        accumulate([=](auto* p) __attribute__((always_inline)) { return load_first(p + i, n - i); });

    for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < Columns; ++c) {
            const float bias = a.bias ? a.bias[column + c] : 0.0f;
            a.out[(row + r) * a.outputs + column + c] = reduce_sum(sum[r][c]) + bias;
        }
}

template <int Rows, class W>
static void band(const Linear& a, int64_t row, int64_t column, int64_t end) {
    for (; column + kTileColumns <= end; column += kTileColumns)
        tile<Rows, kTileColumns, W>(a, row, column);
    for (; column < end; ++column) tile<Rows, 1, W>(a, row, column);
}

// The last rows of a unit, fewer than a full tile, still share one pass over the weights.
template <int Rows, class W>
static void last_band(const Linear& a, int64_t row, int64_t rows, int64_t column, int64_t end) {
    if constexpr (Rows > 0) {
        if (rows == Rows) return band<Rows, W>(a, row, column, end);
        last_band<Rows - 1, W>(a, row, rows, column, end);
    }
}

template <class W>
static void linear(const Linear& a, int64_t unit) {
    const int64_t row_units = ceil_div(a.rows, Linear::kUnitRows);
    int64_t row = unit % row_units * Linear::kUnitRows;
    const int64_t column = unit / row_units * Linear::kUnitColumns;
    const int64_t row_end = row + Linear::kUnitRows < a.rows ? row + Linear::kUnitRows : a.rows;
    const int64_t end =
        column + Linear::kUnitColumns < a.outputs ? column + Linear::kUnitColumns : a.outputs;
    for (; row + kTileRows <= row_end; row += kTileRows) band<kTileRows, W>(a, row, column, end);
    last_band<kTileRows - 1, W>(a, row, row_end - row, column, end);
}

void linear_f32(const Linear& a, int64_t unit) { linear<float>(a, unit); }
void linear_bf16(const Linear& a, int64_t unit) { linear<bf16>(a, unit); }

}  // namespace quire::QUIRE_ISA
