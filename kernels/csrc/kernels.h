// The unit functions of one instruction set, and what its source files share.
#pragma once

#include "lanes.h"

namespace quire::QUIRE_ISA {

void rms_norm(const RmsNorm& a, int64_t row);
void pack_rows(const PackRows& a, int64_t unit);
void linear(const Linear& a, int64_t unit);
void qkv(const Qkv& a, int64_t unit);
void gate_up(const GateUp& a, int64_t unit);
void head(const Head& a, int64_t unit);
void embedding(const Embedding& a, int64_t row);
void silu_mul(const SiluMul& a, int64_t unit);
void kv_write(const KvWrite& a, int64_t row);
void paged_attention(const PagedAttention& a, int64_t unit);
void merge_attention(const MergeAttention& a, int64_t unit);

#if defined(QUIRE_MATRIX_TILES)
constexpr bool kMatrixTiles = true;
#else
constexpr bool kMatrixTiles = false;
#endif

// Fewer rows of integers than these are multiplied in lanes even where there are matrix tiles.
constexpr int kLeastRowsInTiles = 4;

// Rows of a tile by input format; kTileRows is what registers hold sums of.
constexpr int kMostTileRows = kMatrixTiles ? 16 : kTileRows;
constexpr int tile_rows(InputFormat format) {
    if (kMatrixTiles && format >= InputFormat::int8) return 16;
    return format == InputFormat::int16 ? kTileRows / kPlanes16 : kTileRows;
}

// Whether so many rows of a format stand in the form of matrix tiles.
constexpr bool in_matrix_tiles(InputFormat format, int64_t rows) {
    return kMatrixTiles && format >= InputFormat::int8 && rows >= kLeastRowsInTiles;
}

// A tile of inputs: rows `row` .. `row + rows - 1`.
struct InputTile {
    int64_t row, rows;
    uint8_t* values;
    float* scales;
    int32_t* sums;
    Ahead ahead;
};

static inline InputTile tile_at(const InputRows& x, int64_t row) {
    const int64_t step = tile_rows(x.format), groups = x.inputs / x.group;
    const int64_t first = row / step * step;
    return {first, smaller_of(step, x.rows - first),
            x.values + first * x.inputs * bytes_per_input(x.format), x.scales + first * groups,
            x.sums + first * groups, {}};
}

// out[r, 0..31] = row r of a tile of inputs times tile `tile` of w.
void multiply(const Matrix& w, int64_t tile, const InputTile& x, float* out, int64_t stride);

// y[0..width-1] = x normalised by the root of its mean square.
void normalise(const float* x, const float* weight, float eps, int64_t width, float* y);

// Writes the inputs `start .. start + count - 1` of a row: whole groups.
void pack_inputs(const float* x, int64_t start, int64_t count, const InputRows& out, int64_t row);

// Rounds and stores one head of one row in its page.
void put_key(const Pages& pages, int64_t slot, int64_t offset, int64_t head, const float* k);
void put_value(const Pages& pages, int64_t slot, int64_t offset, int64_t head, const float* v);

// In place, both padded to whole blocks of 64: x = H x, each block by itself.
void rotate(float* x, int64_t count);

}  // namespace quire::QUIRE_ISA
