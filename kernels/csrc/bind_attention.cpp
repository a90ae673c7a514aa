#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <optional>

#include "arguments.h"
#include "attention_plan.h"
#include "bindings.h"

namespace quire {

Pages pages_of(const Array& kv, int64_t layer, const std::string& dtype, int64_t page_size,
               int64_t head_dim) {
    const int64_t num_pages = size(kv, "kv", 4, 0), layers = size(kv, "kv", 4, 1);
    const int64_t heads = size(kv, "kv", 4, 2);
    const int64_t elements = 2 * page_size * head_dim, scales = 2 * page_size;
    KvFormat format;
    int64_t head_bytes;
    if (dtype == "fp32")
        format = KvFormat::f32, head_bytes = elements * 4;
    else if (dtype == "bf16")
        format = KvFormat::bf16, head_bytes = elements * 2;
    else if (dtype == "int8")
        format = KvFormat::int8, head_bytes = elements + scales * 4;
    else
        refuse("kv_dtype", "be fp32, bf16 or int8");
    check_index("layer", layer, layers);
    if (page_size < 16 || page_size % 16) refuse("page_size", "be a multiple of 16");
    uint8_t* base = data<uint8_t>(kv, "kv", {num_pages, layers, heads, head_bytes});
    return {format, base + layer * heads * head_bytes, layers * heads * head_bytes, head_bytes,
            page_size, heads, head_dim};
}

namespace {

void kv_write(Array k, Array v, Array kv, int64_t layer, Array pages, Array offsets,
              const std::string& kv_dtype, int64_t page_size) {
    const int64_t rows = size(k, "k", 3, 0), heads = size(k, "k", 3, 1), dim = size(k, "k", 3, 2);
    const KvWrite args{pages_of(kv, layer, kv_dtype, page_size, dim),
                       data<float>(k, "k", {rows, int64_t(kv.shape(2)), dim}),
                       data<float>(v, "v", {rows, heads, dim}),
                       data<int64_t>(pages, "pages", {rows}),
                       data<int64_t>(offsets, "offsets", {rows}), rows};
    for (int64_t row = 0; row < rows; ++row) {
        check_index("pages", args.slots[row], kv.shape(0));
        check_index("offsets", args.offsets[row], page_size);
    }
    run(current_isa().kernels->kv_write, args, rows);
}

void paged_attention(Array q, Array kv, int64_t layer, Array positions, Array query_starts,
                     Array page_tables, const std::string& kv_dtype, int64_t page_size, float scale,
                     std::optional<int64_t> window, Array out) {
    const int64_t rows = size(q, "q", 3, 0), heads = size(q, "q", 3, 1), dim = size(q, "q", 3, 2);
    if (dim == 0 || dim % 16 || dim > PagedAttention::kMaxHeadDim)
        refuse("q", "have a head_dim that is a multiple of 16, at most 256");
    if (window && *window < 1) refuse("window", "be at least 1, not " + std::to_string(*window));
    const Pages pages = pages_of(kv, layer, kv_dtype, page_size, dim);
    const int64_t sequences = size(page_tables, "page_tables", 2, 0);
    const int64_t max_pages = size(page_tables, "page_tables", 2, 1);
    const RaggedRows ragged{data<int64_t>(positions, "positions", {rows}),
                            data<int64_t>(query_starts, "query_starts", {sequences + 1}),
                            data<int32_t>(page_tables, "page_tables", {sequences, max_pages}),
                            rows, sequences, max_pages};
    const AttentionShape shape{int64_t(kv.shape(0)), page_size, pages.kv_heads, heads,
                               window.value_or(0)};
    ThreadPool& pool = ThreadPool::instance();
    const AttentionPlan plan = plan_attention(ragged, shape, pool.size());
    const std::unique_ptr<float[]> partials(
        new float[plan.partials * heads * PagedAttention::partial_size(dim)]);
    const PagedAttention attention{pages, data<float>(q, "q", {rows, heads, dim}),
                                   data<float>(out, "out", {rows, heads, dim}), plan.blocks.data(),
                                   int64_t(plan.blocks.size()),
                                   partials.get(), heads, shape.window, scale};
    const MergeAttention merge{attention, plan.merge_rows.data()};
    const Kernels& kernels = *current_isa().kernels;
    run(kernels.paged_attention, attention, int64_t(plan.blocks.size()) * pages.kv_heads);
    run(kernels.merge_attention, merge, int64_t(plan.merge_rows.size()) * pages.kv_heads);
}

}  // namespace

void bind_attention(nb::module_& m) {
    using namespace nb::literals;
    m.def("kv_write", kv_write, "k"_a, "v"_a, "kv"_a, "layer"_a, "pages"_a, "offsets"_a,
          "kv_dtype"_a, "page_size"_a);
    m.def("paged_attention", paged_attention, "q"_a, "kv"_a, "layer"_a, "positions"_a,
          "query_starts"_a, "page_tables"_a, "kv_dtype"_a, "page_size"_a, "scale"_a,
          "window"_a.none(), "out"_a);
}

}  // namespace quire
