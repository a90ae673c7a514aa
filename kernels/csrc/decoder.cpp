#include "decoder.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "isa.h"

namespace quire {

namespace {

// Rows that a unit takes through one tile of weights: their inputs stay in the nearest caches.
constexpr int64_t kUnitRows = 48;
constexpr int64_t kHeadUnitTiles = 8;

template <auto Kernel, class Args>
void call(const void* args, int64_t unit) {
    (current_isa().kernels->*Kernel)(*static_cast<const Args*>(args), unit);
}

}  // namespace

template <auto Kernel, class Args>
void Decoder::add(const Args& args, int64_t units) {
    phases_.push_back({call<Kernel, Args>, &args, units});
}

void Decoder::run(const DecoderStep& step) {
    const int64_t rows = step.rows.rows;
    if (rows == 0) return;
    plan(step);
    find_slots(step);
    phases_.clear();
    add_first(step);
    for (size_t i = 0; i < layers_.size(); ++i) add_layer(step, int64_t(i));
    if (step.logit_rows > 0) add_head(step);
    ThreadPool::instance().run(phases_.data(), int64_t(phases_.size()));
    choose_best(step);
    if (step.hidden) copy_hidden(step);
}

void Decoder::plan(const DecoderStep& step) {
    const int threads = ThreadPool::instance().size();
    int64_t partials = 0;
    plans_.clear();
    for (const DecoderLayer& layer : weights_.layers) {
        auto same = [&](const auto& known) { return known.first == layer.window; };
        if (std::any_of(plans_.begin(), plans_.end(), same)) continue;
        const AttentionShape shape{step.num_pages, step.pages.page_size, shape_.kv_heads,
                                   shape_.query_heads, layer.window};
        plans_.emplace_back(layer.window, plan_attention(step.rows, shape, threads));
        partials = larger_of(partials, plans_.back().second.partials);
    }
    partials_.of<float>(partials * shape_.query_heads *
                        PagedAttention::partial_size(shape_.head_dim));
}

const AttentionPlan& Decoder::plan_of(int64_t window) const {
    auto same = [&](const auto& known) { return known.first == window; };
    return std::find_if(plans_.begin(), plans_.end(), same)->second;
}

void Decoder::find_slots(const DecoderStep& step) {
    const RaggedRows& rows = step.rows;
    slots_.resize(size_t(rows.rows));
    offsets_.resize(size_t(rows.rows));
    for (int64_t s = 0; s < rows.sequences; ++s)
        for (int64_t row = rows.query_starts[s]; row < rows.query_starts[s + 1]; ++row) {
            const int64_t at = rows.positions[row];
            slots_[row] = rows.page_tables[s * rows.max_pages + at / step.pages.page_size];
            offsets_[row] = at % step.pages.page_size;
        }
}

void Decoder::add_first(const DecoderStep& step) {
    const DecoderWeights& w = weights_;
    const int64_t rows = step.rows.rows;
    float* hidden = hidden_.of<float>(rows * shape_.width);
    embedding_ = {w.embedding, step.token_ids, hidden,
                  scratch_.of<float>(rows * w.embedding.inputs), shape_.width};
    add<&Kernels::embedding>(embedding_, rows);
    if (!step.states) return;
    token_in_ = {hidden, nullptr, w.token_norm, shape_.norm_eps, shape_.width,
                 token_inputs_.of(w.from_token, rows)};
    add<&Kernels::pack_rows>(token_in_, pack_units(token_in_));
    state_in_ = {step.states, nullptr, w.state_norm, shape_.norm_eps, shape_.width,
                 state_inputs_.of(w.from_state, rows)};
    add<&Kernels::pack_rows>(state_in_, pack_units(state_in_));
    const int64_t row_units = ceil_div(rows, kUnitRows);
    from_token_ = {w.from_token, token_in_.out, nullptr, hidden, false, rows, shape_.width,
                   kUnitRows, 1};
    add<&Kernels::linear>(from_token_, row_units * w.from_token.tiles);
    from_state_ = {w.from_state, state_in_.out, nullptr, hidden, true, rows, shape_.width,
                   kUnitRows, 1};
    add<&Kernels::linear>(from_state_, row_units * w.from_state.tiles);
}

void Decoder::add_layer(const DecoderStep& step, int64_t index) {
    const DecoderLayer& w = weights_.layers[index];
    Layer& layer = layers_[index];
    const int64_t rows = step.rows.rows, row_units = ceil_div(rows, kUnitRows);
    const int64_t dim = shape_.head_dim, heads = shape_.query_heads + 2 * shape_.kv_heads;
    float* hidden = hidden_.of<float>(rows * shape_.width);
    float* q = q_.of<float>(rows * shape_.query_heads * dim);
    float* attended = attended_.of<float>(rows * shape_.query_heads * dim);
    Pages pages = step.pages;
    pages.base += index * step.layer_bytes;

    layer.attention_in = {hidden, nullptr, w.attention_norm, shape_.norm_eps, shape_.width,
                          attention_inputs_.of(w.qkv, rows)};
    add<&Kernels::pack_rows>(layer.attention_in, pack_units(layer.attention_in));
    layer.qkv = {w.qkv, layer.attention_in.out, w.qkv_bias, w.q_norm, w.k_norm, shape_.norm_eps,
                 weights_.cos, weights_.sin, step.rows.positions, slots_.data(), offsets_.data(), q,
                 pages, rows, shape_.query_heads, kUnitRows};
    add<&Kernels::qkv>(layer.qkv, row_units * heads);
    add_mark(step, index);
    // Nobody reads what the last layer would add to rows without logits.
    if (step.logit_rows == 0 && index + 1 == int64_t(layers_.size())) return;

    const AttentionPlan& plan = plan_of(w.window);
    layer.attention = {pages, q, attended, plan.blocks.data(), int64_t(plan.blocks.size()),
                       partials_.of<float>(0), shape_.query_heads, w.window, shape_.attention_scale};
    add<&Kernels::paged_attention>(layer.attention, int64_t(plan.blocks.size()) * shape_.kv_heads);
    layer.merge = {layer.attention, plan.merge_rows.data()};
    add<&Kernels::merge_attention>(layer.merge, int64_t(plan.merge_rows.size()) * shape_.kv_heads);

    layer.out_in = {attended, nullptr, nullptr, 0.0f, shape_.query_heads * dim,
                    out_inputs_.of(w.out, rows)};
    add<&Kernels::pack_rows>(layer.out_in, pack_units(layer.out_in));
    layer.out = {w.out, layer.out_in.out, w.out_bias, hidden, true, rows, shape_.width, kUnitRows,
                 1};
    add<&Kernels::linear>(layer.out, row_units * w.out.tiles);

    layer.mlp_in = {hidden, nullptr, w.mlp_norm, shape_.norm_eps, shape_.width,
                    mlp_inputs_.of(w.gate_up, rows)};
    add<&Kernels::pack_rows>(layer.mlp_in, pack_units(layer.mlp_in));
    layer.gate_up = {w.gate_up, layer.mlp_in.out, w.gate_up_bias, down_inputs_.of(w.down, rows),
                     rows, kUnitRows};
    add<&Kernels::gate_up>(layer.gate_up, row_units * (w.gate_up.outputs / (2 * GateUp::kBlock)));
    layer.down = {w.down, layer.gate_up.out, w.down_bias, hidden, true, rows, shape_.width,
                  kUnitRows, 1};
    add<&Kernels::linear>(layer.down, row_units * w.down.tiles);
}

// A phase of one unit: it runs when the keys and values before it are written, by whoever comes by.
void Decoder::add_mark(const DecoderStep& step, int64_t index) {
    const Progress& progress = step.progress;
    const int64_t done = index + 1;
    if (!progress.layers || (done % progress.every && done != int64_t(layers_.size()))) return;
    layers_[index].mark = {progress, done};
    phases_.push_back({call_unit<&Decoder::tell, Mark>, &layers_[index].mark, 1});
}

void Decoder::tell(const Mark& mark, int64_t) {
    const Progress& progress = mark.progress;
    std::atomic_ref<int64_t>(*progress.layers)
        .store(progress.base + mark.layers, std::memory_order_release);
    const uint64_t one = 1;
    // It can only fail when it was signalled 2^64 times and nobody looked: nothing would be lost.
    (void)!write(progress.event, &one, sizeof one);
}

void Decoder::add_head(const DecoderStep& step) {
    const Matrix& w = weights_.head;
    const int64_t rows = step.logit_rows, units = ceil_div(w.tiles, kHeadUnitTiles);
    head_in_ = {hidden_.of<float>(step.rows.rows * shape_.width), step.wanted, weights_.norm,
                shape_.norm_eps, shape_.width, head_inputs_.of(w, rows)};
    add<&Kernels::pack_rows>(head_in_, pack_units(head_in_));
    head_ = {w, head_in_.out, step.logits, best_.of<float>(units * rows),
             best_ids_.of<int32_t>(units * rows), rows, w.outputs, kHeadUnitTiles};
    add<&Kernels::head>(head_, units);
}

// The first of the largest of all units.
void Decoder::choose_best(const DecoderStep& step) {
    const int64_t units = step.logit_rows ? ceil_div(weights_.head.tiles, kHeadUnitTiles) : 0;
    for (int64_t row = 0; row < step.logit_rows; ++row) {
        int64_t best = row;
        bool finite = true;
        for (int64_t at = row; at < units * step.logit_rows; at += step.logit_rows) {
            finite &= head_.best_ids[at] >= 0;
            if (head_.best[at] > head_.best[best]) best = at;
        }
        step.best_ids[row] = finite ? head_.best_ids[best] : -1;
    }
}

void Decoder::copy_hidden(const DecoderStep& step) {
    const int64_t width = shape_.width;
    const float* rows = hidden_.of<float>(step.rows.rows * width);
    for (int64_t row = 0; row < step.logit_rows; ++row)
        std::copy_n(rows + step.wanted[row] * width, width, step.hidden + row * width);
}

}  // namespace quire
