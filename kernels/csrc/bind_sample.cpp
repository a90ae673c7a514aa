// The binding of `kernels/sample`: checks every shape, dtype and id, releases the GIL, calls.
#include <nanobind/ndarray.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bindings.h"
#include "isa.h"
#include "refusal.h"
#include "sample.h"
#include "thread_pool.h"

namespace nb = nanobind;

namespace quire {

SampleScratch sample_scratch(int64_t padded) {
    thread_local struct {
        std::vector<float> values, kept;
        std::vector<double> masses;
        std::vector<int32_t> buckets, counts;
    } memory;
    if (int64_t(memory.values.size()) < padded) {
        memory.values.resize(padded);
        memory.kept.resize(padded);
        memory.masses.resize(padded);
        memory.buckets.resize(padded);
        memory.counts.resize(padded);
    }
    return {memory.values.data(), memory.kept.data(), memory.masses.data(), memory.buckets.data(),
            memory.counts.data()};
}

namespace {

template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Table = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void check_size(const char* name, size_t found, int64_t wanted) {
    if (int64_t(found) != wanted) refuse(name, "have " + std::to_string(wanted) + " entries");
}

template <class T>
Vector<const T> vector_of(nb::handle array, const char* name) {
    Vector<const T> out;
    if (!nb::try_cast(array, out, false))
        refuse(name, "be a contiguous vector of its dtype (see the op's contract)");
    return out;
}

SampleUnit unit_of_current_isa() {
#if defined(__x86_64__)
    const std::string isa = current_isa().name;
    if (isa.starts_with("avx512")) return sample_avx512::sample;
    if (isa.starts_with("avx2")) return sample_avx2::sample;
#endif
    return sample_portable::sample;
}

// The rows of a call. What they point to is held as long as they are.
class Rows {
public:
    void add(nb::handle logits, nb::handle rule, nb::handle output_ids) {
        SampleRow row{};
        take_logits(row, logits);
        take_penalties(row, rule, output_ids);
        take_forbidden(row, rule, int64_t(nb::len(output_ids)));
        row.temperature = field<float>(rule, "temperature");
        row.log_min_p = field<float>(rule, "log_min_p");
        row.top_k = field<int64_t>(rule, "top_k");
        row.top_p = field<double>(rule, "top_p");
        row.seed = field<uint64_t>(rule, "seed");
        row.position = field<uint32_t>(rule, "num_prompt") + uint32_t(nb::len(output_ids));
        row.choice_index = field<uint32_t>(rule, "choice_index");
        const nb::object num_top = rule.attr("num_top");
        row.num_top = num_top.is_none() ? -1 : nb::cast<int64_t>(num_top);
        rows_.push_back(row);
    }

    void write_to(int32_t* token_ids, float* logprobs, int32_t* top_ids, float* top_logprobs,
                  int64_t max_top) {
        for (SampleRow& row : rows_) {
            if (row.num_top > max_top) refuse("top_ids", "have room for num_top of every row");
            const int64_t index = &row - rows_.data();
            row.token_id = token_ids + index;
            row.logprob = logprobs + index;
            row.top_ids = top_ids + index * max_top;
            row.top_logprobs = top_logprobs + index * max_top;
        }
    }

    void run() const {
        const Sample batch{rows_.data(), vocab_};
        nb::gil_scoped_release released;
        ThreadPool::instance().run(unit_of_current_isa(), batch, int64_t(rows_.size()));
    }

private:
    template <class T>
    static T field(nb::handle rule, const char* name) {
        T out;
        if (!nb::try_cast(rule.attr(name), out)) refuse(name, "be a number in its range");
        return out;
    }

    void take_logits(SampleRow& row, nb::handle logits) {
        floats_.push_back(vector_of<float>(logits, "logits"));
        const auto& held = floats_.back();
        if (rows_.empty()) vocab_ = int64_t(held.size());
        check_size("logits", held.size(), vocab_);
        row.logits = held.data();
    }

    void take_penalties(SampleRow& row, nb::handle rule, nb::handle output_ids) {
        row.num_biases = take_ids(row.bias_ids, rule.attr("bias_ids"), "bias_ids");
        floats_.push_back(vector_of<float>(rule.attr("biases"), "biases"));
        check_size("biases", floats_.back().size(), row.num_biases);
        row.biases = floats_.back().data();
        row.repetition = field<float>(rule, "repetition");
        row.presence = field<float>(rule, "presence");
        row.frequency = field<float>(rule, "frequency");
        if (row.repetition != 1)
            row.num_seen = take_ids(row.seen_ids, rule.attr("seen_ids"), "seen_ids");
        if (row.repetition != 1 || row.presence != 0 || row.frequency != 0)
            row.num_output = take_ids(row.output_ids, output_ids, "output_ids");
    }

    int64_t take_ids(const int32_t*& out, nb::handle array, const char* name) {
        ids_.push_back(vector_of<int32_t>(array, name));
        const auto& held = ids_.back();
        out = held.data();
        for (size_t i = 0; i < held.size(); ++i)
            if (out[i] < 0 || out[i] >= vocab_)
                refuse(name, "be in 0.." + std::to_string(vocab_ - 1) + ", not " +
                                 std::to_string(out[i]));
        return int64_t(held.size());
    }

    void take_forbidden(SampleRow& row, nb::handle rule, int64_t num_output) {
        const bool early = num_output < field<int64_t>(rule, "min_tokens");
        const nb::object mask = rule.attr(early ? "forbidden_early" : "forbidden");
        if (mask.is_none()) return;
        masks_.push_back(vector_of<bool>(mask, "forbidden"));
        check_size("forbidden", masks_.back().size(), vocab_);
        row.forbidden = masks_.back().data();
    }

    int64_t vocab_ = 0;
    std::vector<SampleRow> rows_;
    std::vector<Vector<const float>> floats_;
    std::vector<Vector<const int32_t>> ids_;
    std::vector<Vector<const bool>> masks_;
};

void sample(nb::sequence logits, nb::sequence rules, nb::sequence output_ids,
            Vector<int32_t> token_ids, Vector<float> logprobs, Table<int32_t> top_ids,
            Table<float> top_logprobs) {
    const int64_t count = int64_t(nb::len(logits)), max_top = int64_t(top_ids.shape(1));
    check_size("rules", nb::len(rules), count);
    check_size("output_ids", nb::len(output_ids), count);
    check_size("token_ids", token_ids.size(), count);
    check_size("logprobs", logprobs.size(), count);
    check_size("top_ids", top_ids.shape(0), count);
    check_size("top_logprobs", top_logprobs.size(), count * max_top);
    Rows rows;
    for (int64_t i = 0; i < count; ++i) rows.add(logits[i], rules[i], output_ids[i]);
    rows.write_to(token_ids.data(), logprobs.data(), top_ids.data(), top_logprobs.data(), max_top);
    rows.run();
}

}  // namespace

void bind_sample(nb::module_& m) {
    using namespace nb::literals;
    m.def("sample", sample, "logits"_a, "rules"_a, "output_ids"_a,
          "token_ids"_a.noconvert(), "logprobs"_a.noconvert(), "top_ids"_a.noconvert(),
          "top_logprobs"_a.noconvert());
}

}  // namespace quire
