// What choosing tokens takes and gives: plain arguments, raw pointers. `kernels/sample` defines it.
//
// A unit is a row. The unit functions are compiled per instruction set with equal bits; code of one
// set must never be linked into another, so all they use has internal linkage or is declared here.
#pragma once

#include <cstdint>

namespace quire {

constexpr int32_t kNotNumbers = -1, kNothingLeft = -2;  // in place of a token id

struct SampleRow {
    const float* logits;                      // [vocab]
    const bool* forbidden;                    // [vocab] or null
    const int32_t *bias_ids, *seen_ids, *output_ids;  // seen: of the prompt, each once
    const float* biases;
    int64_t num_biases, num_seen, num_output;
    float repetition, presence, frequency;
    float temperature;  // 0: argmax
    float log_min_p;    // -Inf: off
    int64_t top_k;      // 0: off
    double top_p;       // 1: off
    uint64_t seed;
    uint32_t position, choice_index;
    int64_t num_top;  // -1: no logprobs at all

    int32_t* token_id;
    float* logprob;
    int32_t* top_ids;     // [num_top], -1 where there are no more
    float* top_logprobs;  // [num_top]
};

struct Sample {
    const SampleRow* rows;
    int64_t vocab;
};

// Memory of the calling thread, kept for its next row; every array has room for `padded` entries.
struct SampleScratch {
    static constexpr int64_t kPadding = 64;
    static int64_t padded(int64_t vocab) { return (vocab + kPadding - 1) / kPadding * kPadding; }

    float *values, *kept;
    double* masses;
    int32_t *buckets, *counts;  // counts are 0 between rows
};

SampleScratch sample_scratch(int64_t padded);

using SampleUnit = void (*)(const Sample&, int64_t row);

namespace sample_portable { void sample(const Sample& batch, int64_t row); }
namespace sample_avx2 { void sample(const Sample& batch, int64_t row); }
namespace sample_avx512 { void sample(const Sample& batch, int64_t row); }

}  // namespace quire
