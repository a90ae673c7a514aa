// The only file that knows Python: checks every shape, dtype and index, releases the GIL, calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "thread_pool.h"

namespace nb = nanobind;
using Array = nb::ndarray<>;

namespace quire {
namespace {

[[noreturn]] void refuse(const std::string& name, const std::string& what) {
    throw std::invalid_argument(name + " must " + what);
}

template <class T>
constexpr nb::dlpack::dtype kType = nb::dtype<T>();
template <>
constexpr nb::dlpack::dtype kType<bf16>{uint8_t(nb::dlpack::dtype_code::Bfloat), 16, 1};

template <class T>
bool holds(const Array& a) {
    return a.dtype() == kType<T>;
}

std::string text(std::initializer_list<int64_t> shape) {
    std::string out = "[";
    for (int64_t size : shape) out += (out.size() > 1 ? ", " : "") + std::to_string(size);
    return out + "]";
}

// The address of a CPU array that is C-contiguous and of exactly this shape.
void* address(const Array& a, const char* name, std::initializer_list<int64_t> shape) {
    if (a.device_type() != nb::device::cpu::value) refuse(name, "be in CPU memory");
    bool equal = a.ndim() == shape.size();
    for (size_t i = 0; equal && i < shape.size(); ++i) equal = a.shape(i) == *(shape.begin() + i);
    if (!equal) refuse(name, "have shape " + text(shape));
    int64_t stride = 1;
    for (size_t i = a.ndim(); i-- > 0; stride *= a.shape(i))
        if (a.shape(i) > 1 && a.stride(i) != stride) refuse(name, "be contiguous");
    return a.data();
}

template <class T>
T* data(const Array& a, const char* name, std::initializer_list<int64_t> shape) {
    if (!holds<T>(a)) refuse(name, "have another dtype (see the op's contract)");
    return static_cast<T*>(address(a, name, shape));
}

int64_t size(const Array& a, const char* name, size_t dimensions, size_t dimension) {
    if (a.ndim() != dimensions) refuse(name, "have " + std::to_string(dimensions) + " dimensions");
    return a.shape(dimension);
}

// True for bf16, false for fp32; nothing else is allowed.
bool is_bf16(const Array& a, const char* name) {
    if (!holds<bf16>(a) && !holds<float>(a)) refuse(name, "be fp32 or bf16");
    return holds<bf16>(a);
}

void check_index(const char* name, int64_t value, int64_t limit) {
    if (value < 0 || value >= limit)
        refuse(name, "be in 0.." + std::to_string(limit - 1) + ", not " + std::to_string(value));
}

template <class Args>
void run(Unit<Args> unit, const Args& args, int64_t units) {
    nb::gil_scoped_release released;
    ThreadPool::instance().run(unit, args, units);
}

void rms_norm(Array x, Array weight, float eps, Array out) {
    const int64_t rows = size(x, "x", 2, 0), width = size(x, "x", 2, 1);
    const RmsNorm args{data<float>(x, "x", {rows, width}), data<float>(weight, "weight", {width}),
                       data<float>(out, "out", {rows, width}), rows, width, eps};
    run(current_isa().kernels->rms_norm, args, rows);
}

void linear(Array x, Array weight, std::optional<Array> bias, Array out) {
    const int64_t rows = size(x, "x", 2, 0), inputs = size(x, "x", 2, 1);
    const int64_t outputs = size(weight, "weight", 2, 0);
    const bool narrow = is_bf16(weight, "weight");
    const Linear args{data<float>(x, "x", {rows, inputs}),
                      address(weight, "weight", {outputs, inputs}),
                      bias ? data<float>(*bias, "bias", {outputs}) : nullptr,
                      data<float>(out, "out", {rows, outputs}), rows, inputs, outputs};
    const Kernels& kernels = *current_isa().kernels;
    run(narrow ? kernels.linear_bf16 : kernels.linear_f32, args,
        ceil_div(rows, Linear::kUnitRows) * ceil_div(outputs, Linear::kUnitColumns));
}

void silu_mul(Array gate, Array up, Array out) {
    const int64_t rows = size(gate, "gate", 2, 0), width = size(gate, "gate", 2, 1);
    const SiluMul args{data<float>(gate, "gate", {rows, width}),
                       data<float>(up, "up", {rows, width}),
                       data<float>(out, "out", {rows, width}), rows * width};
    run(current_isa().kernels->silu_mul, args, ceil_div(rows * width, SiluMul::kUnitElements));
}

// `kv` [num_pages, num_layers, num_kv_heads, 2, page_size * head_dim] seen as one layer's pages.
Pages layer_pages(const Array& kv, int64_t layer, int64_t page_size, int64_t head_dim) {
    const int64_t layers = size(kv, "kv", 5, 1), heads = size(kv, "kv", 5, 2);
    const int64_t layer_elements = heads * 2 * page_size * head_dim;
    check_index("layer", layer, layers);
    if (page_size < 16 || page_size % 16) refuse("page_size", "be a multiple of 16");
    auto base = static_cast<char*>(
        address(kv, "kv", {int64_t(kv.shape(0)), layers, heads, 2, page_size * head_dim}));
    return {base + layer * layer_elements * (is_bf16(kv, "kv") ? 2 : 4), layers * layer_elements,
            page_size, heads, head_dim};
}

void kv_write(Array k, Array v, Array kv, int64_t layer, Array pages, Array offsets,
              int64_t page_size) {
    const int64_t rows = size(k, "k", 3, 0), heads = size(kv, "kv", 5, 2), dim = size(k, "k", 3, 2);
    const KvWrite args{layer_pages(kv, layer, page_size, dim),
                       data<float>(k, "k", {rows, heads, dim}),
                       data<float>(v, "v", {rows, heads, dim}),
                       data<int64_t>(pages, "pages", {rows}),
                       data<int64_t>(offsets, "offsets", {rows}), rows};
    for (int64_t row = 0; row < rows; ++row) {
        check_index("pages", args.slots[row], kv.shape(0));
        check_index("offsets", args.offsets[row], page_size);
    }
    const Kernels& kernels = *current_isa().kernels;
    run(is_bf16(kv, "kv") ? kernels.kv_write_bf16 : kernels.kv_write_f32, args, rows);
}

// Each row's page table, after checking that every page the row reads is in the pool.
std::vector<const int32_t*> checked_row_pages(const Array& query_starts, const Array& page_tables,
                                              const int64_t* positions, int64_t rows,
                                              int64_t page_size, int64_t num_pages) {
    const int64_t sequences = size(page_tables, "page_tables", 2, 0);
    const int64_t max_pages = size(page_tables, "page_tables", 2, 1);
    const auto* tables = data<int32_t>(page_tables, "page_tables", {sequences, max_pages});
    const auto* starts = data<int64_t>(query_starts, "query_starts", {sequences + 1});
    if (starts[0] != 0 || starts[sequences] != rows)
        refuse("query_starts", "ascend from 0 to " + std::to_string(rows));
    std::vector<const int32_t*> row_pages(rows);
    for (int64_t s = 0; s < sequences; ++s) {
        if (starts[s] > starts[s + 1] || starts[s + 1] > rows)
            refuse("query_starts", "ascend from 0 to " + std::to_string(rows));
        int64_t checked = 0;  // pages of this sequence
        for (int64_t row = starts[s]; row < starts[s + 1]; ++row) {
            check_index("positions", positions[row], max_pages * page_size);
            row_pages[row] = tables + s * max_pages;
            for (; checked <= positions[row] / page_size; ++checked)
                check_index("page_tables", row_pages[row][checked], num_pages);
        }
    }
    return row_pages;
}

void paged_attention(Array q, Array kv, int64_t layer, Array positions, Array query_starts,
                     Array page_tables, int64_t page_size, float scale, Array out) {
    const int64_t rows = size(q, "q", 3, 0), heads = size(q, "q", 3, 1), dim = size(q, "q", 3, 2);
    const Pages pages = layer_pages(kv, layer, page_size, dim);
    if (dim == 0 || dim % 16 || dim > PagedAttention::kMaxHeadDim)
        refuse("q", "have a head_dim that is a multiple of 16, at most 256");
    if (pages.kv_heads == 0 || heads % pages.kv_heads)
        refuse("q", "have a multiple of the KV heads as heads");
    const auto* at = data<int64_t>(positions, "positions", {rows});
    const auto row_pages =
        checked_row_pages(query_starts, page_tables, at, rows, page_size, kv.shape(0));
    const PagedAttention args{pages, data<float>(q, "q", {rows, heads, dim}),
                              data<float>(out, "out", {rows, heads, dim}), at, row_pages.data(),
                              rows, heads, scale};
    const Kernels& kernels = *current_isa().kernels;
    run(is_bf16(kv, "kv") ? kernels.paged_attention_bf16 : kernels.paged_attention_f32, args,
        rows * pages.kv_heads);
}

std::vector<std::string> names(bool supported_only) {
    std::vector<std::string> out;
    for (const Isa& isa : isas())
        if (!supported_only || isa.supported()) out.emplace_back(isa.name);
    return out;
}

void set_num_threads(int count) {
    if (count < 1) refuse("count", "be at least 1");
    nb::gil_scoped_release released;
    ThreadPool::instance().resize(count);
}

}  // namespace
}  // namespace quire

NB_MODULE(_native, m) {
    using namespace nb::literals;
    m.def("rms_norm", quire::rms_norm, "x"_a, "weight"_a, "eps"_a, "out"_a);
    m.def("linear", quire::linear, "x"_a, "weight"_a, "bias"_a.none(), "out"_a);
    m.def("silu_mul", quire::silu_mul, "gate"_a, "up"_a, "out"_a);
    m.def("kv_write", quire::kv_write, "k"_a, "v"_a, "kv"_a, "layer"_a, "pages"_a, "offsets"_a,
          "page_size"_a);
    m.def("paged_attention", quire::paged_attention, "q"_a, "kv"_a, "layer"_a, "positions"_a,
          "query_starts"_a, "page_tables"_a, "page_size"_a, "scale"_a, "out"_a);
    m.def("isa", [] { return quire::current_isa().name; });
    m.def("select_isa", quire::select_isa, "name"_a);
    m.def("supported_isas", [] { return quire::names(true); });
    m.def("set_num_threads", quire::set_num_threads, "count"_a);
    m.def("num_threads", [] { return quire::ThreadPool::instance().size(); });
    m.attr("ISAS") = nb::cast(quire::names(false));
}
