// The module: what is not of one part below binds here, the rest in a file by its part.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "arguments.h"
#include "bindings.h"

namespace quire {
namespace {

void rms_norm(Array x, Array weight, float eps, Array out) {
    const int64_t rows = size(x, "x", 2, 0), width = size(x, "x", 2, 1);
    const RmsNorm args{data<float>(x, "x", {rows, width}), data<float>(weight, "weight", {width}),
                       data<float>(out, "out", {rows, width}), rows, width, eps};
    run(current_isa().kernels->rms_norm, args, rows);
}

void silu_mul(Array gate, Array up, Array out) {
    const int64_t rows = size(gate, "gate", 2, 0), width = size(gate, "gate", 2, 1);
    const SiluMul args{data<float>(gate, "gate", {rows, width}),
                       data<float>(up, "up", {rows, width}),
                       data<float>(out, "out", {rows, width}), rows * width};
    run(current_isa().kernels->silu_mul, args, ceil_div(rows * width, SiluMul::kUnitElements));
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

namespace nb = nanobind;

NB_MODULE(_native, m) {
    using namespace nb::literals;
    quire::bind_attention(m);
    quire::bind_decoder(m);
    quire::bind_peaks(m);
    quire::bind_sample(m);
    quire::bind_suffix_automaton(m);
    m.def("rms_norm", quire::rms_norm, "x"_a, "weight"_a, "eps"_a, "out"_a);
    m.def("silu_mul", quire::silu_mul, "gate"_a, "up"_a, "out"_a);
    m.def("isa", [] { return quire::current_isa().name; });
    m.def("select_isa", quire::select_isa, "name"_a);
    m.def("supported_isas", [] { return quire::names(true); });
    m.def("set_num_threads", quire::set_num_threads, "count"_a);
    m.def("num_threads", [] { return quire::ThreadPool::instance().size(); });
    m.attr("ISAS") = nb::cast(quire::names(false));
}
