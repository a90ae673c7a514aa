// The binding of `kernels/suffix_automaton`.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <vector>

#include "bindings.h"
#include "refusal.h"
#include "suffix_automaton.h"

namespace nb = nanobind;

namespace quire {
namespace {

using Tokens = std::vector<int32_t>;

Tokens part(const SuffixAutomaton& automaton, int64_t start, int64_t end) {
    const Tokens& text = automaton.text();
    if (start < 0) refuse("start", "be at least 0");
    start = std::min(start, int64_t(text.size()));
    end = std::clamp(end, start, int64_t(text.size()));
    return {text.begin() + start, text.begin() + end};
}

}  // namespace

void bind_suffix_automaton(nb::module_& m) {
    using namespace nb::literals;
    nb::class_<SuffixReader>(m, "SuffixReader")
        .def("read",
             [](SuffixReader& reader, const Tokens& tokens) {
                 for (int32_t token : tokens) reader.read(token);
             },
             "tokens"_a)
        .def_prop_ro("match", &SuffixReader::match);
    nb::class_<SuffixAutomaton>(m, "SuffixAutomaton")
        .def(nb::init<>())
        .def("__len__", [](const SuffixAutomaton& automaton) { return automaton.text().size(); })
        .def("append",
             [](SuffixAutomaton& automaton, const Tokens& tokens) {
                 for (int32_t token : tokens) automaton.append(token);
             },
             "tokens"_a)
        .def("tokens", part, "start"_a, "end"_a)
        .def_prop_ro("repeat", &SuffixAutomaton::repeat)
        .def("reader", [](const SuffixAutomaton& automaton) { return SuffixReader(automaton); },
             nb::keep_alive<0, 1>());
}

}  // namespace quire
