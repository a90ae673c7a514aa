// What crosses between the binding, the thread pool and the kernels: plain arguments, raw pointers.
//
// An op is cut into units, each writing its own part of the output, so that any thread may take any
// unit. A table of unit functions exists per instruction set. Everything inline here has internal
// linkage: code compiled for one instruction set must never be linked into another.
#pragma once

#include <cstdint>

namespace quire {

struct bf16 {
    uint16_t bits;
};

static inline float to_f32(bf16 a) {
    const uint32_t bits = uint32_t(a.bits) << 16;
    float r;
    __builtin_memcpy(&r, &bits, sizeof r);
    return r;
}

// Nearest, ties to even; NaN stays NaN.
static inline bf16 round_to_bf16(float a) {
    uint32_t bits;
    __builtin_memcpy(&bits, &a, sizeof bits);
    bits += 0x7FFF + ((bits >> 16) & 1);
    return {a != a ? uint16_t(0x7FC0) : uint16_t(bits >> 16)};
}

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
static inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int64_t kTileOutputs = 32;  // outputs that stand together in a packed matrix
constexpr int64_t kRotation = 64;     // inputs of one Walsh-Hadamard block

enum class WeightFormat : int { f32, bf16, int8, int4 };
enum class Offsets : int { none, zeros, minimums };
enum class InputFormat : int { f32, bf16, int8, int16 };
constexpr int64_t bytes_per_input(InputFormat format) {
    constexpr int64_t bytes[] = {4, 2, 1, 2};
    return bytes[int(format)];
}
// Matrix tiles take 16 rows where fewer are left, and leave out what comes of the others.
constexpr int64_t kReadBeyondInputs = 16 * 128;

// Weights packed in tiles of 32 outputs, one after the other, each one run of bytes:
//   f32    [inputs][32]
//   bf16   [inputs / 2][32][2]
//   int8   per group: scales [32] of 16 bits, offsets [32] of 16 bits if any,
//          [group / 4][32][4] unsigned, 128 standing for 0 unless there are offsets
//   int4   the same with [group / 8][32][4] bytes: input 8 j + i of a group in the low, 8 j + 4 + i
//          in the high half of byte i; 8 standing for 0 unless there are offsets
struct Matrix {
    WeightFormat format;
    InputFormat reads;  // the form its product wants inputs in
    Offsets offsets;
    bool bf16_scales;  // else fp16
    bool rotated;      // by Walsh-Hadamard blocks along the inputs, as its inputs are
    int64_t outputs, width;  // weights
    int64_t tiles, inputs, group;  // outputs and width padded to whole tiles and groups
    int64_t tile_bytes;
    const uint8_t* data;

    // What is stored for a weight of 0, if there are no offsets.
    int32_t zero() const { return format == WeightFormat::int8 ? 128 : 8; }
};

// The weights fetched by hand while others are multiplied: `bytes` further on, none if that is 0. A
// single row's may go to the second cache only, line by line; all others go to the first.
struct Ahead {
    int32_t bytes = 0;
    bool to_second = false;
};

// Rows of inputs in the form a product wants, in tiles of as many rows as go through a tile of
// weights together (the last one has what is left). A few inputs of each row of a tile in turn:
//   f32    [inputs][rows];        bf16    [inputs / 2][rows][2]
//   int8   [inputs / 4][rows][4]; int16   [inputs / 4][rows][high, low][4], 256 high + low
//   or, where products take 16 bits, int16 [inputs / 4][rows][4]
//   or, in matrix tiles, [inputs / group][rows][group] and [inputs / group][high, low][rows][group]
// Integers have a scale and `sum_factor` times their sum per group and row of a tile,
// [inputs / group][rows]: what weights that are stored as unsigned add too much, if they have no offsets.
struct InputRows {
    InputFormat format;
    bool rotated;
    int32_t sum_factor;
    int64_t rows, inputs, group;
    uint8_t* values;
    float* scales;
    int32_t* sums;
    Ahead ahead;
};

// The largest magnitude an integer input takes: 16 bits are cut into two signed bytes.
constexpr float kLargest8 = 127, kLargest16 = 127 * 256 + 127;

struct RmsNorm {
    const float* x;       // [rows, width]
    const float* weight;  // [width]
    float* out;           // [rows, width]
    int64_t rows, width;
    float eps;
};

// Rows of x, normalised if there is a weight, into inputs of a product.
struct PackRows {
    const float* x;              // [any, width]
    const int64_t* rows;         // which row of x, or null for each
    const float* norm;           // [width] or null
    float eps;
    int64_t width;
    InputRows out;
};

struct Linear {
    Matrix weight;
    InputRows x;
    const float* bias;  // [outputs] or null
    float* out;         // [rows, outputs]
    bool add;           // to what is in out
    int64_t rows, outputs;
    int64_t unit_rows, unit_tiles;
};

// Pages of one layer and dtype, as kernels/layout.py describes them: `base` points to that layer in
// page 0.
enum class KvFormat : int { f32, bf16, int8 };
struct Pages {
    KvFormat format;
    uint8_t* base;
    int64_t page_bytes, head_bytes, page_size, kv_heads, head_dim;
};

struct KvWrite {
    Pages pages;
    const float* k;          // [rows, kv_heads, head_dim]
    const float* v;          // [rows, kv_heads, head_dim]
    const int64_t* slots;    // [rows]
    const int64_t* offsets;  // [rows]
    int64_t rows;
};

// Queries, keys and values of one layer; a unit is a head of any of the three.
struct Qkv {
    Matrix weight;  // every head padded to whole tiles
    InputRows x;
    const float* bias;    // [(query_heads + 2 kv_heads) * head_dim] or null
    const float* q_norm;  // [head_dim] or null
    const float* k_norm;  // [head_dim] or null
    float eps;
    const float* cos;  // [positions, head_dim / 2]
    const float* sin;
    const int64_t* positions;  // [rows]
    const int64_t* slots;      // [rows]
    const int64_t* offsets;    // [rows]
    float* q;                  // [rows, query_heads, head_dim]
    Pages pages;
    int64_t rows, query_heads, unit_rows;
};

// down's inputs from gate's and up's outputs; a unit is a block of them, padded by the weight.
struct GateUp {
    static constexpr int64_t kBlock = 128;  // a multiple of every group
    Matrix weight;  // per block: gate's tiles, then up's
    InputRows x;
    const float* bias;  // as the weight's outputs, or null
    InputRows out;
    int64_t rows, unit_rows;
};

// Logits, and the largest of every unit's outputs.
struct Head {
    Matrix weight;
    InputRows x;
    float* logits;         // [rows, outputs], or null if nobody wants them
    float* best;           // [units, rows]
    int32_t* best_ids;     // [units, rows]; -1 if a logit is NaN or infinite
    int64_t rows, outputs, unit_tiles;
};

struct Embedding {
    Matrix table;
    const int64_t* token_ids;  // [rows]
    float* out;                // [rows, width]
    float* scratch;            // [rows, table.inputs]
    int64_t width;
};

struct SiluMul {
    static constexpr int64_t kUnitElements = 8192;
    const float* gate;  // [count]
    const float* up;    // [count]
    float* out;         // [count]
    int64_t count;
};

// Rows at consecutive positions of one sequence, and the chunks of keys that one unit takes.
struct AttentionBlock {
    const int32_t* page_table;
    int64_t row, rows, position;  // `position` is that of the first row
    int64_t chunk, chunks;
    int64_t partial;  // -1 if these are all chunks its rows see, else where its partials start:
                      // row r and chunk c have number partial + (c - chunk) * rows + r
};

struct PagedAttention {
    static constexpr int64_t kChunkTokens = 128, kMaxHeadDim = 256, kMaxLines = 48;
    Pages pages;
    const float* q;  // [rows, query_heads, head_dim]
    float* out;      // [rows, query_heads, head_dim]
    const AttentionBlock* blocks;
    int64_t num_blocks;
    float* partials;  // [partials, query_heads, partial_size]
    int64_t query_heads, window;  // window 0: all
    float scale;

    // The largest score, the sum of weights, the sum of weighted values.
    static constexpr int64_t partial_size(int64_t head_dim) { return 2 + head_dim; }
};

// A row whose chunks several units took: its partials, in ascending order.
struct MergeRow {
    int64_t row, partial, stride, chunks;  // number of the first one, from one to the next, how many
};
struct MergeAttention {
    PagedAttention attention;
    const MergeRow* rows;
};

template <class Args>
using Unit = void (*)(const Args&, int64_t unit);

struct Kernels {
    Unit<RmsNorm> rms_norm;         // unit: a row
    Unit<PackRows> pack_rows;       // unit: a tile
    Unit<Linear> linear;            // unit: unit_rows x unit_tiles
    Unit<Qkv> qkv;                  // unit: unit_rows x a head
    Unit<GateUp> gate_up;           // unit: unit_rows x a block
    Unit<Head> head;                // unit: unit_tiles
    Unit<Embedding> embedding;      // unit: a row
    Unit<SiluMul> silu_mul;         // unit: 8192 elements
    Unit<KvWrite> kv_write;         // unit: a row
    Unit<PagedAttention> paged_attention;  // unit: block x KV head
    Unit<MergeAttention> merge_attention;  // unit: a merge row x KV head
    int64_t (*tile_rows)(InputFormat);     // rows that go through a tile of weights together
};

namespace portable { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx2_vnni { extern const Kernels kernels; }
namespace avx512_vnni { extern const Kernels kernels; }
namespace amx_int8 { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }

}  // namespace quire
