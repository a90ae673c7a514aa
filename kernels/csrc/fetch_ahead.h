// Which weights are fetched by hand ahead of their use. Whether that helps, with few rows above all,
// differs from processor to processor more than anything else here, so it is measured.
#pragma once

#include <array>
#include <vector>

#include "ops.h"

namespace quire {

// By the rows that go through a tile of weights together: from 1, 2, 4 and 8 on.
using FetchAhead = std::array<Ahead, 4>;

constexpr FetchAhead kUsualFetchAhead{Ahead{}, {}, {}, {2048, false}};

// What this process uses, at first the usual.
FetchAhead fetch_ahead();
void set_fetch_ahead(const FetchAhead& ahead);

// What so many rows use.
Ahead fetch_ahead_of(int64_t rows);

// Tries on these matrices, the first time it is called with more of them than caches hold; changes
// no result. Takes about as long as 60 steps.
void measure_fetch_ahead(const std::vector<Matrix>& weights);

}  // namespace quire
