// Each part of the module binds itself.
#pragma once

#include <nanobind/nanobind.h>

namespace quire {

void bind_attention(nanobind::module_& m);
void bind_decoder(nanobind::module_& m);
void bind_peaks(nanobind::module_& m);
void bind_sample(nanobind::module_& m);
void bind_suffix_automaton(nanobind::module_& m);

}  // namespace quire
