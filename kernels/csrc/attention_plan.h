// Who attends to what in one step: its rows cut into blocks, and the keys of long ones into ranges
// of chunks, so that threads have units of like cost. No bit depends on the cut. One plan serves
// every layer of a step that has the same window.
#pragma once

#include <vector>

#include "ops.h"

namespace quire {

// The rows of a step as kernels/ragged.py describes them.
struct RaggedRows {
    const int64_t* positions;     // [rows]
    const int64_t* query_starts;  // [sequences + 1]
    const int32_t* page_tables;   // [sequences, max_pages]
    int64_t rows, sequences, max_pages;
};

struct AttentionShape {
    int64_t num_pages, page_size, kv_heads, query_heads;
    int64_t window;  // 0: all
};

struct AttentionPlan {
    std::vector<AttentionBlock> blocks;  // the costly ones first; they point into page_tables
    std::vector<MergeRow> merge_rows;
    int64_t partials = 0;
};

// Throws std::invalid_argument, naming the argument, if a row range, a position, or the slot of a
// page that a row sees something of is out of range, or the shape is not one the kernel can do.
AttentionPlan plan_attention(const RaggedRows& rows, const AttentionShape& shape, int threads);

}  // namespace quire
