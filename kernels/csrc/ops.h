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

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct RmsNorm {
    const float* x;       // [rows, width]
    const float* weight;  // [width]
    float* out;           // [rows, width]
    int64_t rows, width;
    float eps;
};

// The element type of the weight is chosen by the unit function.
struct Linear {
    static constexpr int64_t kUnitRows = 96, kUnitColumns = 32;
    const float* x;      // [rows, inputs]
    const void* weight;  // [outputs, inputs]
    const float* bias;   // [outputs] or null
    float* out;          // [rows, outputs]
    int64_t rows, inputs, outputs;
};

struct SiluMul {
    static constexpr int64_t kUnitElements = 8192;
    const float* gate;  // [count]
    const float* up;    // [count]
    float* out;         // [count]
    int64_t count;
};

// Pages of one layer: `kv` points to that layer in page 0, `page_stride` counts elements.
struct Pages {
    void* kv;
    int64_t page_stride, page_size, kv_heads, head_dim;
};

struct KvWrite {
    Pages pages;
    const float* k;          // [rows, kv_heads, head_dim]
    const float* v;          // [rows, kv_heads, head_dim]
    const int64_t* slots;    // [rows]
    const int64_t* offsets;  // [rows]
    int64_t rows;
};

struct PagedAttention {
    static constexpr int64_t kChunkTokens = 128, kMaxHeadDim = 256;
    Pages pages;
    const float* q;                   // [rows, query_heads, head_dim]
    float* out;                       // [rows, query_heads, head_dim]
    const int64_t* positions;         // [rows]
    const int32_t* const* row_pages;  // [rows], each the page table of the row's sequence
    int64_t rows, query_heads;
    float scale;
};

template <class Args>
using Unit = void (*)(const Args&, int64_t unit);

struct Kernels {
    Unit<RmsNorm> rms_norm;                                     // unit: a row
    Unit<Linear> linear_f32, linear_bf16;                       // unit: 96 rows x 32 columns
    Unit<SiluMul> silu_mul;                                     // unit: 8192 elements
    Unit<KvWrite> kv_write_f32, kv_write_bf16;                  // unit: a row
    Unit<PagedAttention> paged_attention_f32, paged_attention_bf16;  // unit: (row, KV head)
};

namespace portable { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

}  // namespace quire
