// A Llama-family decoder as a flat program: every step is one list of phases for the thread pool.
#pragma once

#include <utility>
#include <vector>

#include "attention_plan.h"
#include "buffers.h"
#include "thread_pool.h"

namespace quire {

struct DecoderShape {
    int64_t width, query_heads, kv_heads, head_dim;
    float norm_eps, attention_scale;
};

// Null where the model has none.
struct DecoderLayer {
    const float *attention_norm, *mlp_norm, *q_norm, *k_norm;
    const float *qkv_bias, *out_bias, *gate_up_bias, *down_bias;
    Matrix qkv, out, gate_up, down;
    int64_t window;  // 0: all positions
};

struct DecoderWeights {
    Matrix embedding, head;
    std::vector<DecoderLayer> layers;
    const float *norm, *cos, *sin;
    // Of one that goes on from hidden rows, else without outputs: a row begins as the sum of what
    // these make of the hidden row of the token before it and of its token's embedding.
    Matrix from_state, from_token;
    const float *state_norm, *token_norm;
    int64_t first_layer;  // the pages' layer that is layer 0 of these
};

// Who is told how far a step is: once the keys and values of every `every` layers are in the pages,
// and of the last, `*layers` becomes their number plus `base` and `event`, an eventfd, is signalled.
struct Progress {
    int64_t* layers;  // null: nobody
    int64_t base, every;
    int event;
};

// One step's rows; `pages` are those of layer 0.
struct DecoderStep {
    RaggedRows rows;
    const int64_t* token_ids;
    const float* states;  // [rows, width], or null
    Pages pages;
    int64_t layer_bytes, num_pages;
    int64_t logit_rows;
    const int64_t* wanted;  // [logit_rows], rows
    float* logits;          // [logit_rows, vocabulary], or null if only the best are wanted
    int32_t* best_ids;      // [logit_rows], -1 where a logit is NaN or infinite
    float* hidden;          // [logit_rows, width] before the last norm, or null
    Progress progress;
};

class Decoder {
public:
    Decoder(const DecoderShape& shape, const DecoderWeights& weights)
        : shape_(shape), weights_(weights), layers_(weights.layers.size()) {}

    // Runs a step on the process's pool. Called by one thread at a time. Throws
    // std::invalid_argument, before anything is written, if a row does not fit its pages.
    void run(const DecoderStep& step);

private:
    struct Mark {
        Progress progress;
        int64_t layers;
    };

    // The arguments of a layer's phases, which outlive the step's list.
    struct Layer {
        PackRows attention_in, out_in, mlp_in;
        Qkv qkv;
        Mark mark;
        PagedAttention attention;
        MergeAttention merge;
        Linear out, down;
        GateUp gate_up;
    };

    void plan(const DecoderStep& step);
    const AttentionPlan& plan_of(int64_t window) const;
    void find_slots(const DecoderStep& step);
    void add_first(const DecoderStep& step);
    void add_layer(const DecoderStep& step, int64_t index);
    static void tell(const Mark& mark, int64_t unit);
    void add_mark(const DecoderStep& step, int64_t index);
    void add_head(const DecoderStep& step);
    void choose_best(const DecoderStep& step);
    void copy_hidden(const DecoderStep& step);
    template <auto Kernel, class Args>
    void add(const Args& args, int64_t units);

    const DecoderShape shape_;
    const DecoderWeights weights_;
    std::vector<Layer> layers_;
    Embedding embedding_;
    PackRows state_in_, token_in_, head_in_;
    Linear from_state_, from_token_;
    Head head_;
    std::vector<Phase> phases_;
    std::vector<std::pair<int64_t, AttentionPlan>> plans_;  // by window
    std::vector<int64_t> slots_, offsets_;
    Buffer hidden_, q_, attended_, partials_, scratch_, best_, best_ids_;
    InputBuffer state_inputs_, token_inputs_;
    InputBuffer attention_inputs_, out_inputs_, mlp_inputs_, down_inputs_, head_inputs_;
};

}  // namespace quire
