// The products of a step with what is fused after them. A unit goes through its rows in tiles that
// share a pass over the weights; how rows are tiled changes no bit.
#include "exp.h"
#include "kernels.h"

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t kMostOutputs = PagedAttention::kMaxHeadDim;

struct RowRange {
    int64_t start, end;
};

RowRange rows_of(int64_t unit, int64_t unit_rows, int64_t rows) {
    return {unit * unit_rows, smaller_of((unit + 1) * unit_rows, rows)};
}

// Calls then(tile of inputs) for those of a range of rows, which ends where tiles end. The first rows
// wait for their weights, so what they need next is fetched. The second find theirs in a cache, and
// the memory has time: what the first rows need of the next `next` bytes is fetched.
template <class Then>
QUIRE_INLINE void for_row_tiles(RowRange range, const InputRows& x, int64_t next, Then then) {
    const int64_t step = tile_rows(x.format);
    for (int64_t row = range.start; row < range.end; row += step) {
        InputTile tile = tile_at(x, row);
        if (row == 0)
            tile.ahead = x.ahead;
        else if (row == step && x.ahead.bytes)
            tile.ahead = {int32_t(next), false};
        then(tile);
    }
}

QUIRE_INLINE F16 silu(F16 x) {
    const F16 zero = broadcast(0.0f), one = broadcast(1.0f);
    const F16 e = exp_negative(if_less(x, zero, x, zero - x));
    return x * if_less(x, zero, e, one) / (one + e);
}

void add_bias(float* out, const float* bias, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] += bias[i];
}

// Pairs (d, d + D/2), as Hugging Face pairs them.
void rotate_positions(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t d = 0; d < half; ++d) {
        const float first = x[d], second = x[d + half];
        x[d] = first * cos[d] - second * sin[d];
        x[d + half] = second * cos[d] + first * sin[d];
    }
}

}  // namespace

void linear(const Linear& a, int64_t unit) {
    const int64_t row_units = ceil_div(a.rows, a.unit_rows);
    const RowRange range = rows_of(unit % row_units, a.unit_rows, a.rows);
    const int64_t first = unit / row_units * a.unit_tiles;
    for (int64_t tile = first; tile < smaller_of(first + a.unit_tiles, a.weight.tiles); ++tile) {
        const int64_t output = tile * kTileOutputs;
        const int64_t count = smaller_of(kTileOutputs, a.outputs - output);
        for_row_tiles(range, a.x, a.weight.tile_bytes, [&](const InputTile& x) {
            alignas(64) float result[kMostTileRows * kTileOutputs];
            multiply(a.weight, tile, x, result, kTileOutputs);
            for (int64_t r = 0; r < x.rows; ++r) {
                float* from = result + r * kTileOutputs;
                float* to = a.out + (x.row + r) * a.outputs + output;
                if (a.bias) add_bias(from, a.bias + output, count);
                for (int64_t i = 0; i < count; ++i) to[i] = a.add ? to[i] + from[i] : from[i];
            }
        });
    }
}

void qkv(const Qkv& a, int64_t unit) {
    const int64_t row_units = ceil_div(a.rows, a.unit_rows), dim = a.pages.head_dim;
    const int64_t head = unit / row_units, tiles = ceil_div(dim, kTileOutputs);
    const int64_t key_head = head - a.query_heads, value_head = key_head - a.pages.kv_heads;
    const float* norm = value_head >= 0 ? nullptr : key_head >= 0 ? a.k_norm : a.q_norm;
    for_row_tiles(rows_of(unit % row_units, a.unit_rows, a.rows), a.x, tiles * a.weight.tile_bytes,
                  [&](const InputTile& inputs) {
        alignas(64) float result[kMostTileRows * kMostOutputs];
        for (int64_t t = 0; t < tiles; ++t)
            multiply(a.weight, head * tiles + t, inputs, result + t * kTileOutputs, kMostOutputs);
        for (int64_t r = 0; r < inputs.rows; ++r) {
            float* x = result + r * kMostOutputs;
            if (a.bias) add_bias(x, a.bias + head * dim, dim);
            if (norm) normalise(x, norm, a.eps, dim, x);
            const int64_t at = inputs.row + r, angle = a.positions[at] * (dim / 2);
            if (value_head >= 0) {
                put_value(a.pages, a.slots[at], a.offsets[at], value_head, x);
                continue;
            }
            rotate_positions(x, a.cos + angle, a.sin + angle, dim / 2);
            if (key_head >= 0)
                put_key(a.pages, a.slots[at], a.offsets[at], key_head, x);
            else
                __builtin_memcpy(a.q + (at * a.query_heads + head) * dim, x, size_t(4 * dim));
        }
    });
}

void gate_up(const GateUp& a, int64_t unit) {
    constexpr int64_t kBlock = GateUp::kBlock, kTiles = kBlock / kTileOutputs;
    const int64_t row_units = ceil_div(a.rows, a.unit_rows), block = unit / row_units;
    const int64_t start = block * kBlock, count = smaller_of(kBlock, a.out.inputs - start);
    const int64_t block_bytes = 2 * kTiles * a.weight.tile_bytes;
    for_row_tiles(rows_of(unit % row_units, a.unit_rows, a.rows), a.x, block_bytes,
                  [&](const InputTile& x) {
        alignas(64) float result[kMostTileRows * 2 * kBlock];
        for (int64_t t = 0; t < 2 * kTiles; ++t)
            multiply(a.weight, block * 2 * kTiles + t, x, result + t * kTileOutputs, 2 * kBlock);
        for (int64_t r = 0; r < x.rows; ++r) {
            float* gate = result + r * 2 * kBlock;
            if (a.bias) add_bias(gate, a.bias + 2 * start, 2 * kBlock);
            for (int64_t i = 0; i < count; i += 16)
                store(gate + i, silu(load(gate + i)) * load(gate + kBlock + i));
            pack_inputs(gate, start, count, a.out, x.row + r);
        }
    });
}

void silu_mul(const SiluMul& a, int64_t unit) {
    int64_t i = unit * SiluMul::kUnitElements;
    const int64_t end = smaller_of(i + SiluMul::kUnitElements, a.count);
    for (; i + 16 <= end; i += 16) store(a.out + i, silu(load(a.gate + i)) * load(a.up + i));
    if (i < end) {
        const int64_t n = end - i;
        store_first(a.out + i, silu(load_first(a.gate + i, n)) * load_first(a.up + i, n), n);
    }
}

// The first of the largest, or -1 where a logit is NaN or infinite.
static void note_best(const float* logits, int64_t count, int64_t first, float* best, int32_t* id) {
    F16 top = broadcast(-__builtin_inff()), poison = broadcast(0.0f);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const F16 a = load(logits + i);
        top = larger(top, a);
        poison = fma(a, broadcast(0.0f), poison);
    }
    float largest = reduce_larger(top), zero_or_nan = reduce_sum(poison);
    for (; i < count; ++i) {
        largest = logits[i] > largest ? logits[i] : largest;
        zero_or_nan += logits[i] * 0.0f;
    }
    if (zero_or_nan != 0.0f) *id = -1;
    if (*id < 0 || !(largest > *best)) return;
    for (i = 0; logits[i] != largest;) ++i;
    *best = largest;
    *id = int32_t(first + i);
}

void head(const Head& a, int64_t unit) {
    const int64_t start = unit * a.unit_tiles;
    const int64_t end = smaller_of(start + a.unit_tiles, a.weight.tiles);
    float* best = a.best + unit * a.rows;
    int32_t* ids = a.best_ids + unit * a.rows;
    for (int64_t row = 0; row < a.rows; ++row) {
        best[row] = -__builtin_inff();
        ids[row] = 0;
    }
    for (int64_t tile = start; tile < end; ++tile) {
        const int64_t output = tile * kTileOutputs;
        const int64_t count = smaller_of(kTileOutputs, a.outputs - output);
        for_row_tiles({0, a.rows}, a.x, a.weight.tile_bytes, [&](const InputTile& x) {
            alignas(64) float result[kMostTileRows * kTileOutputs];
            multiply(a.weight, tile, x, result, kTileOutputs);
            for (int64_t row = x.row; row < x.row + x.rows; ++row) {
                const float* logits = result + (row - x.row) * kTileOutputs;
                note_best(logits, count, output, best + row, ids + row);
                if (a.logits)
                    __builtin_memcpy(a.logits + row * a.outputs + output, logits,
                                     size_t(4 * count));
            }
        });
    }
}

}  // namespace quire::QUIRE_ISA
