#include "attention_plan.h"

#include <algorithm>

#include "refusal.h"

namespace quire {

namespace {

constexpr int64_t kChunk = PagedAttention::kChunkTokens;
constexpr int64_t kUnitsPerThread = 8;
constexpr int64_t kFewestLines = 12;  // below, loads are shared by too few
constexpr int64_t kLoadCost = 6;      // of a chunk, as against a line's arithmetic on it

// Rows of one sequence at consecutive positions.
struct Run {
    const int32_t* page_table;
    int64_t row, rows, position;

    int64_t last() const { return position + rows - 1; }
    int64_t first_seen(int64_t window) const {
        return window ? larger_of(0, position - window + 1) : 0;
    }
    AttentionBlock block(int64_t start, int64_t count, int64_t window) const {
        const Run part{page_table, row + start, count, position + start};
        const int64_t chunk = part.first_seen(window) / kChunk;
        return {page_table, part.row, count, part.position, chunk, part.last() / kChunk + 1 - chunk,
                -1};
    }
};

std::vector<Run> runs_of(const RaggedRows& rows) {
    std::vector<Run> runs;
    for (int64_t s = 0; s < rows.sequences; ++s)
        for (int64_t row = rows.query_starts[s]; row < rows.query_starts[s + 1]; ++row) {
            const int64_t position = rows.positions[row];
            if (row > rows.query_starts[s] && position == runs.back().last() + 1)
                ++runs.back().rows;
            else
                runs.push_back({rows.page_tables + s * rows.max_pages, row, 1, position});
        }
    return runs;
}

void check_starts(const RaggedRows& rows) {
    bool ascend = rows.query_starts[0] == 0 && rows.query_starts[rows.sequences] == rows.rows;
    for (int64_t s = 0; s < rows.sequences; ++s)
        ascend = ascend && rows.query_starts[s] <= rows.query_starts[s + 1];
    if (!ascend) refuse("query_starts", "ascend from 0 to " + std::to_string(rows.rows));
}

void check_pages(const std::vector<Run>& runs, const AttentionShape& shape) {
    for (const Run& run : runs)
        for (int64_t page = run.first_seen(shape.window) / shape.page_size;
             page <= run.last() / shape.page_size; ++page)
            check_index("page_tables", run.page_table[page], shape.num_pages);
}

int64_t cost(const AttentionBlock& block, int64_t group) {
    return block.chunks * (kLoadCost + block.rows * group);
}

std::vector<AttentionBlock> blocks_of(const std::vector<Run>& runs, int64_t most_rows,
                                      int64_t window) {
    std::vector<AttentionBlock> blocks;
    for (const Run& run : runs) {
        const int64_t count = ceil_div(run.rows, most_rows);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t start = run.rows * i / count;
            blocks.push_back(run.block(start, run.rows * (i + 1) / count - start, window));
        }
    }
    return blocks;
}

// Cuts a block's chunks into `count` ranges whose partials are merged row by row.
void split(const AttentionBlock& block, int64_t count, int64_t window, AttentionPlan& plan) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t start = block.chunks * i / count, end = block.chunks * (i + 1) / count;
        AttentionBlock part = block;
        part.chunk += start;
        part.chunks = end - start;
        part.partial = plan.partials + start * block.rows;
        plan.blocks.push_back(part);
    }
    const Run run{block.page_table, block.row, block.rows, block.position};
    for (int64_t row = 0; row < block.rows; ++row) {
        const AttentionBlock own = run.block(row, 1, window);
        plan.merge_rows.push_back({own.row,
                                   plan.partials + (own.chunk - block.chunk) * block.rows + row,
                                   block.rows, own.chunks});
    }
    plan.partials += block.chunks * block.rows;
}

}  // namespace

AttentionPlan plan_attention(const RaggedRows& rows, const AttentionShape& shape, int threads) {
    if (shape.page_size < 16 || shape.page_size % 16) refuse("page_size", "be a multiple of 16");
    if (shape.kv_heads < 1 || shape.query_heads % shape.kv_heads ||
        shape.query_heads > shape.kv_heads * PagedAttention::kMaxLines)
        refuse("q", "have 1 to 48 times as many heads as kv");
    check_starts(rows);
    for (int64_t row = 0; row < rows.rows; ++row)
        check_index("positions", rows.positions[row], rows.max_pages * shape.page_size);
    const std::vector<Run> runs = runs_of(rows);
    check_pages(runs, shape);

    const int64_t group = shape.query_heads / shape.kv_heads;
    const int64_t units = threads > 1 ? threads * kUnitsPerThread : 1;
    const int64_t most_rows =
        std::clamp(ceil_div(rows.rows * shape.kv_heads, units), ceil_div(kFewestLines, group),
                   PagedAttention::kMaxLines / group);
    AttentionPlan plan;
    int64_t total = 1;
    const std::vector<AttentionBlock> blocks = blocks_of(runs, most_rows, shape.window);
    for (const AttentionBlock& block : blocks) total += cost(block, group) * shape.kv_heads;
    for (const AttentionBlock& block : blocks) {
        const int64_t wanted = ceil_div(cost(block, group) * units, total);
        const int64_t count = std::min(block.chunks, wanted);
        if (count > 1)
            split(block, count, shape.window, plan);
        else
            plan.blocks.push_back(block);
    }
    std::stable_sort(plan.blocks.begin(), plan.blocks.end(),
                     [&](const AttentionBlock& a, const AttentionBlock& b) {
                         return cost(a, group) > cost(b, group);
                     });
    return plan;
}

}  // namespace quire
