// Which instruction set the kernels of this process use.
#pragma once

#include <string>
#include <vector>

#include "ops.h"

namespace quire {

struct Isa {
    const char* name;
    const Kernels* kernels;
    bool (*supported)();  // by this CPU
};

// All that this build contains, best first; the last one runs everywhere.
const std::vector<Isa>& isas();

// The chosen one, at first the best supported.
const Isa& current_isa();

// How many units pack_rows has, on the chosen one.
inline int64_t pack_units(const PackRows& pack) {
    return ceil_div(pack.out.rows, current_isa().kernels->tile_rows(pack.out.format));
}

// Whether this CPU multiplies 8-bit integers in matrix tiles and the system lets this process.
bool may_use_matrix_tiles();

// Throws std::invalid_argument if `name` is unknown or this CPU does not have it.
void select_isa(const std::string& name);

}  // namespace quire
