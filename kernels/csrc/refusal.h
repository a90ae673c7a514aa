// How a bad argument is refused, by its name.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace quire {

[[noreturn]] inline void refuse(const std::string& name, const std::string& what) {
    throw std::invalid_argument(name + " must " + what);
}

inline void check_index(const char* name, int64_t value, int64_t limit) {
    if (value < 0 || value >= limit)
        refuse(name, "be in 0.." + std::to_string(limit - 1) + ", not " + std::to_string(value));
}

}  // namespace quire
