// Packed matrices, the product with one, and the decoder as a whole.
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>

#include "arguments.h"
#include "bindings.h"
#include "decoder.h"
#include "fetch_ahead.h"

namespace quire {
namespace {

template <size_t Count>
int index_of(const char* name, const std::string& value,
             const std::array<const char*, Count>& names) {
    for (size_t i = 0; i < Count; ++i)
        if (value == names[i]) return int(i);
    std::string allowed;
    for (const char* each : names) allowed += (allowed.empty() ? "" : ", ") + std::string(each);
    refuse(name, "be one of " + allowed + ", not " + value);
}

// A matrix and the memory it stands in.
struct HeldMatrix {
    Array data;
    Matrix matrix;
};

int64_t tile_bytes(const Matrix& w) {
    const int64_t weights = w.inputs * kTileOutputs;
    if (w.format == WeightFormat::f32) return 4 * weights;
    if (w.format == WeightFormat::bf16) return 2 * weights;
    const int64_t per_group = w.offsets == Offsets::none ? 64 : 128;
    return w.inputs / w.group * per_group + (w.format == WeightFormat::int8 ? 1 : 0.5) * weights;
}

HeldMatrix make_matrix(const std::string& format, const std::string& reads,
                       const std::string& offsets, bool bf16_scales, bool rotated, int64_t outputs,
                       int64_t width, int64_t inputs, int64_t group, Array data) {
    Matrix w{};
    w.format = WeightFormat(index_of<4>("format", format, {"f32", "bf16", "int8", "int4"}));
    w.reads = InputFormat(index_of<4>("reads", reads, {"f32", "bf16", "int8", "int16"}));
    w.offsets = Offsets(index_of<3>("offsets", offsets, {"none", "zeros", "minimums"}));
    const bool integers = w.format >= WeightFormat::int8;
    if (integers != (w.reads >= InputFormat::int8) ||
        (!integers && int(w.reads) != int(w.format)))
        refuse("reads", "fit the format");
    if (group != 32 && group != 64 && group != 128) refuse("group", "be 32, 64 or 128");
    if (outputs < 1) refuse("outputs", "be at least 1");
    if (width < 1 || width > inputs) refuse("width", "be in 1..inputs");
    if (rotated && group % kRotation) refuse("group", "be whole blocks of 64 where rotated");
    if (inputs % group || inputs % kRotation) refuse("inputs", "be whole groups and blocks of 64");
    w.bf16_scales = bf16_scales;
    w.rotated = rotated;
    w.outputs = outputs;
    w.width = width;
    w.inputs = inputs;
    w.group = group;
    w.tiles = ceil_div(outputs, kTileOutputs);
    w.tile_bytes = tile_bytes(w);
    w.data = quire::data<uint8_t>(data, "data", {w.tiles, w.tile_bytes});
    return {data, w};
}

void linear(Array x, const HeldMatrix& weight, std::optional<Array> bias, Array out) {
    const Matrix& w = weight.matrix;
    const int64_t rows = size(x, "x", 2, 0);
    InputBuffer buffer;
    const PackRows pack{data<float>(x, "x", {rows, w.width}), nullptr, nullptr, 0.0f, w.width,
                        buffer.of(w, rows)};
    const Linear args{w, pack.out, bias ? data<float>(*bias, "bias", {w.outputs}) : nullptr,
                      data<float>(out, "out", {rows, w.outputs}), false, rows, w.outputs, 48, 1};
    run(current_isa().kernels->pack_rows, pack, pack_units(pack));
    run(current_isa().kernels->linear, args, ceil_div(rows, 48) * w.tiles);
}

void embedding(Array token_ids, const HeldMatrix& table, Array out) {
    const Matrix& w = table.matrix;
    const int64_t rows = size(token_ids, "token_ids", 1, 0);
    const auto* ids = data<int64_t>(token_ids, "token_ids", {rows});
    for (int64_t row = 0; row < rows; ++row) check_index("token_ids", ids[row], w.outputs);
    Buffer scratch;
    const Embedding args{w, ids, data<float>(out, "out", {rows, w.width}),
                         scratch.of<float>(rows * w.inputs), w.width};
    run(current_isa().kernels->embedding, args, rows);
}

const float* vector_of(nb::handle owner, const char* name, int64_t length) {
    const nb::object value = owner.attr(name);
    return value.is_none() ? nullptr : data<float>(nb::cast<Array>(value), name, {length});
}

Matrix matrix_of(nb::handle owner, const char* name, int64_t outputs, int64_t width) {
    const Matrix& w = nb::cast<const HeldMatrix&>(owner.attr(name)).matrix;
    if (w.outputs != outputs) refuse(name, "have " + std::to_string(outputs) + " outputs");
    if (w.width != width) refuse(name, "have " + std::to_string(width) + " inputs");
    return w;
}

using Tables = std::vector<std::vector<int64_t>>;

// Page tables of one length, -1 behind their own. What is no slot of the pool is refused where it is
// looked up; here, what 32 bits do not hold.
struct PaddedTables {
    int64_t number, most = 0;
    std::vector<int32_t> slots;

    explicit PaddedTables(const Tables& tables) : number(int64_t(tables.size())) {
        for (const auto& table : tables) most = larger_of(most, int64_t(table.size()));
        slots.assign(size_t(number * most), -1);
        for (int64_t i = 0; i < number; ++i)
            for (size_t j = 0; j < tables[size_t(i)].size(); ++j) {
                const int64_t slot = tables[size_t(i)][j];
                if (slot != int32_t(slot)) refuse("page_tables", "be slots of the pool");
                slots[size_t(i * most) + j] = int32_t(slot);
            }
    }
};

// The decoder and the Python object whose arrays it reads.
class HeldDecoder {
public:
    explicit HeldDecoder(nb::object weights)
        : owner_(weights), shape_(shape_of(weights)), weights_(weights_of(weights)),
          decoder_(shape_, weights_) {
        if (goes_on_) return;
        std::vector<Matrix> matrices;
        for (const DecoderLayer& layer : weights_.layers)
            matrices.insert(matrices.end(), {layer.qkv, layer.out, layer.gate_up, layer.down});
        matrices.push_back(weights_.head);
        nb::gil_scoped_release released;
        measure_fetch_ahead(matrices);
    }

    // The best ids of the rows wanted. Numbers come as Python's own: arrays of a few cost more.
    std::vector<int32_t> forward(
        const std::vector<int64_t>& token_ids, const std::optional<Array>& states,
        const std::vector<int64_t>& positions, const std::vector<int64_t>& query_starts,
        const Tables& page_tables, const Array& kv, const std::string& kv_dtype, int64_t page_size,
        const std::vector<int64_t>& logit_rows, const std::optional<Array>& logits,
        const std::optional<Array>& hidden, const std::optional<Array>& layers_done,
        int64_t mark_every, int progress_event) {
        const int64_t rows = int64_t(token_ids.size()), wanted = int64_t(logit_rows.size());
        if (int64_t(positions.size()) != rows) refuse("positions", "be as many as token_ids");
        if (query_starts.size() != page_tables.size() + 1)
            refuse("query_starts", "be one more than page_tables");
        const PaddedTables tables(page_tables);
        std::vector<int32_t> best(logit_rows.size());
        DecoderStep step = in_pages(kv, kv_dtype, page_size);
        step.rows = {positions.data(), query_starts.data(), tables.slots.data(),
                     rows,             tables.number,       tables.most};
        step.token_ids = token_ids.data();
        if (states.has_value() != goes_on_)
            refuse("states", "be given if the weights go on from some");
        if (states) step.states = data<float>(*states, "states", {rows, shape_.width});
        step.logit_rows = wanted;
        step.wanted = logit_rows.data();
        step.best_ids = best.data();
        if (logits)
            step.logits = data<float>(*logits, "logits", {wanted, weights_.head.outputs});
        if (hidden) step.hidden = data<float>(*hidden, "hidden", {wanted, shape_.width});
        if (layers_done) {
            if (mark_every < 1) refuse("mark_every", "be at least 1");
            auto* done = data<int64_t>(*layers_done, "layers_done", {1});
            step.progress = {done, *done, mark_every, progress_event};
        }
        check(step);
        nb::gil_scoped_release released;
        ThreadPool::instance().expect_next(step.hidden);  // hidden rows are for drafts
        decoder_.run(step);
        return best;
    }

    // What it drafts after each row, going on from what it said.
    std::vector<std::vector<int64_t>> draft(
        std::vector<int64_t> token_ids, const std::vector<Array>& states,
        std::vector<int64_t> positions, const Tables& page_tables, const Array& kv,
        const std::string& kv_dtype, int64_t page_size, const std::vector<int64_t>& lengths) {
        const int64_t rows = int64_t(token_ids.size()), width = shape_.width;
        if (!goes_on_) refuse("states", "be given if the weights go on from some");
        for (size_t size : {states.size(), positions.size(), page_tables.size(), lengths.size()})
            if (int64_t(size) != rows)
                refuse("token_ids", "be as many as states, positions, page_tables and lengths");
        for (int64_t row = 0; row < rows; ++row) {
            if (lengths[row] < 0 || (row && lengths[row] > lengths[row - 1]))
                refuse("lengths", "be at least 0 and not ascend");
            if (positions[row] < 0 || positions[row] > max_positions_ - lengths[row])
                refuse("positions", "leave room for the drafts");
        }
        const PaddedTables tables(page_tables);
        std::vector<float> hidden(size_t(rows * width));
        std::vector<int64_t> each(size_t(rows + 1));
        for (int64_t row = 0; row <= rows; ++row) each[row] = row;
        for (int64_t row = 0; row < rows; ++row)
            std::copy_n(data<float>(states[row], "states", {width}), width,
                        hidden.begin() + row * width);
        std::vector<int32_t> best(token_ids.size());
        DecoderStep step = in_pages(kv, kv_dtype, page_size);
        step.rows = {positions.data(), each.data(), tables.slots.data(), rows, rows, tables.most};
        step.token_ids = token_ids.data();
        step.states = step.hidden = hidden.data();
        step.wanted = each.data();
        step.best_ids = best.data();
        check(step);
        std::vector<std::vector<int64_t>> drafts(token_ids.size());
        nb::gil_scoped_release released;
        ThreadPool::instance().expect_next(true);  // the step that verifies them
        for (int64_t depth = 0, left = rows;; ++depth) {
            while (left > 0 && lengths[left - 1] <= depth) --left;
            if (left == 0) return drafts;
            step.rows.rows = step.rows.sequences = step.logit_rows = left;
            decoder_.run(step);
            for (int64_t row = 0; row < left; ++row) {
                const int64_t token = best[row] < 0 ? -1 : ids_[best[row]];
                drafts[row].push_back(token);
                token_ids[row] = larger_of(token, 0);  // after what is no token nothing is used
                ++positions[row];
            }
        }
    }

private:
    // A step without rows.
    DecoderStep in_pages(const Array& kv, const std::string& kv_dtype, int64_t page_size) const {
        DecoderStep step{};
        step.pages = pages_of(kv, weights_.first_layer, kv_dtype, page_size, shape_.head_dim);
        const int64_t layers = weights_.first_layer + int64_t(weights_.layers.size());
        const int64_t found = kv.shape(1);
        if (step.pages.kv_heads != shape_.kv_heads || (goes_on_ ? found < layers : found != layers))
            refuse("kv", "have the model's layers and KV heads");
        step.layer_bytes = step.pages.kv_heads * step.pages.head_bytes;
        step.num_pages = kv.shape(0);
        return step;
    }

    void check(const DecoderStep& step) const {
        for (int64_t row = 0; row < step.rows.rows; ++row) {
            check_index("token_ids", step.token_ids[row], weights_.embedding.outputs);
            check_index("positions", step.rows.positions[row], max_positions_);
        }
        for (int64_t i = 0; i < step.logit_rows; ++i)
            check_index("logit_rows", step.wanted[i], step.rows.rows);
    }

    DecoderShape shape_of(nb::handle w) {
        DecoderShape shape{};
        auto number = [&](const char* name) { return nb::cast<int64_t>(w.attr(name)); };
        shape.width = number("width");
        shape.query_heads = number("num_heads");
        shape.kv_heads = number("num_kv_heads");
        shape.head_dim = number("head_dim");
        shape.norm_eps = nb::cast<float>(w.attr("norm_eps"));
        shape.attention_scale = nb::cast<float>(w.attr("attention_scale"));
        if (shape.head_dim < 16 || shape.head_dim % 16 || shape.head_dim > 256)
            refuse("head_dim", "be a multiple of 16, at most 256");
        if (shape.kv_heads < 1 || shape.query_heads % shape.kv_heads)
            refuse("num_heads", "be a multiple of num_kv_heads");
        return shape;
    }

    DecoderWeights weights_of(nb::handle w) {
        DecoderWeights out{};
        const Array cos = nb::cast<Array>(w.attr("cos"));
        max_positions_ = size(cos, "cos", 2, 0);
        const int64_t half = shape_.head_dim / 2;
        out.cos = data<float>(cos, "cos", {max_positions_, half});
        out.sin = data<float>(nb::cast<Array>(w.attr("sin")), "sin", {max_positions_, half});
        out.norm = vector_of(w, "norm", shape_.width);
        const auto& table = nb::cast<const HeldMatrix&>(w.attr("embedding")).matrix;
        out.embedding = matrix_of(w, "embedding", table.outputs, shape_.width);
        const auto& head = nb::cast<const HeldMatrix&>(w.attr("head")).matrix;
        out.head = matrix_of(w, "head", head.outputs, shape_.width);
        for (nb::handle layer : w.attr("layers")) out.layers.push_back(layer_of(layer));
        goes_on_ = !w.attr("states").is_none();
        if (goes_on_) {
            const nb::object states = w.attr("states");
            out.from_state = matrix_of(states, "from_state", shape_.width, shape_.width);
            out.from_token = matrix_of(states, "from_token", shape_.width, shape_.width);
            out.state_norm = vector_of(states, "state_norm", shape_.width);
            out.token_norm = vector_of(states, "token_norm", shape_.width);
            out.first_layer = nb::cast<int64_t>(states.attr("first_layer"));
            const auto ids = nb::cast<Array>(states.attr("ids"));
            const auto* first = data<int64_t>(ids, "ids", {out.head.outputs});
            ids_.assign(first, first + out.head.outputs);
            for (int64_t id : ids_) check_index("ids", id, out.embedding.outputs);
        }
        return out;
    }

    DecoderLayer layer_of(nb::handle w) const {
        const int64_t dim = shape_.head_dim, padded = round_up(dim, kTileOutputs);
        const int64_t heads = shape_.query_heads + 2 * shape_.kv_heads;
        const int64_t attended = shape_.query_heads * dim;
        DecoderLayer out{};
        out.attention_norm = vector_of(w, "attention_norm", shape_.width);
        out.mlp_norm = vector_of(w, "mlp_norm", shape_.width);
        out.q_norm = vector_of(w, "q_norm", dim);
        out.k_norm = vector_of(w, "k_norm", dim);
        out.qkv = matrix_of(w, "qkv", heads * padded, shape_.width);
        out.out = matrix_of(w, "out", shape_.width, attended);
        const auto& gate_up = nb::cast<const HeldMatrix&>(w.attr("gate_up")).matrix;
        if (gate_up.outputs % (2 * GateUp::kBlock)) refuse("gate_up", "have whole blocks as outputs");
        out.gate_up = matrix_of(w, "gate_up", gate_up.outputs, shape_.width);
        const auto& down = nb::cast<const HeldMatrix&>(w.attr("down")).matrix;
        if (round_up(down.inputs, GateUp::kBlock) != gate_up.outputs / 2)
            refuse("down", "have gate_up's blocks as inputs");
        out.down = matrix_of(w, "down", shape_.width, down.width);
        out.qkv_bias = vector_of(w, "qkv_bias", heads * dim);
        out.out_bias = vector_of(w, "out_bias", shape_.width);
        out.gate_up_bias = vector_of(w, "gate_up_bias", gate_up.outputs);
        out.down_bias = vector_of(w, "down_bias", shape_.width);
        const nb::object window = w.attr("window");
        out.window = window.is_none() ? 0 : nb::cast<int64_t>(window);
        return out;
    }

    nb::object owner_;
    int64_t max_positions_ = 0;
    bool goes_on_ = false;
    std::vector<int64_t> ids_;  // that the head's outputs stand for, if it goes on
    DecoderShape shape_;
    DecoderWeights weights_;
    Decoder decoder_;
};

}  // namespace

void bind_decoder(nb::module_& m) {
    using namespace nb::literals;
    nb::class_<HeldMatrix>(m, "Matrix")
        .def_prop_ro("outputs", [](const HeldMatrix& w) { return w.matrix.outputs; });
    m.def("make_matrix", make_matrix, "format"_a, "reads"_a, "offsets"_a, "bf16_scales"_a,
          "rotated"_a, "outputs"_a, "width"_a, "inputs"_a, "group"_a, "data"_a);
    m.def("linear", linear, "x"_a, "weight"_a, "bias"_a.none(), "out"_a);
    nb::class_<Ahead>(m, "Ahead")
        .def(nb::init<int32_t, bool>(), "bytes"_a, "to_second"_a)
        .def_ro("bytes", &Ahead::bytes)
        .def_ro("to_second", &Ahead::to_second);
    m.def("fetch_ahead", &fetch_ahead);
    m.def("set_fetch_ahead", &set_fetch_ahead, "ahead"_a);
    m.def("embedding", embedding, "token_ids"_a, "table"_a, "out"_a);
    nb::class_<HeldDecoder>(m, "Decoder")
        .def(nb::init<nb::object>(), "weights"_a)
        .def("forward", &HeldDecoder::forward, "token_ids"_a, "states"_a.none(), "positions"_a,
             "query_starts"_a, "page_tables"_a, "kv"_a, "kv_dtype"_a, "page_size"_a,
             "logit_rows"_a, "logits"_a.none(), "hidden"_a = nb::none(), "layers_done"_a = nb::none(),
             "mark_every"_a = 1, "progress_event"_a = -1)
        .def("draft", &HeldDecoder::draft, "token_ids"_a, "states"_a, "positions"_a, "page_tables"_a, "kv"_a,
             "kv_dtype"_a, "page_size"_a, "lengths"_a);
}

}  // namespace quire
