// What this CPU can do at best: multiply-adds from registers, bytes read from memory.
#pragma once

#include <cstdint>

namespace quire {

struct Loop {
    const char* arithmetic;    // "int8", "int8 tiles", "bf16" or "fp32"
    const char* instruction;   // what multiplies
    void (*run)(int64_t rounds);
    int64_t ops_per_round;     // a multiply-add is two
};

// The best loop this CPU has for an arithmetic; null if it has none of its own.
const Loop* best_loop(const char* arithmetic);

// Operations per second of `threads` threads that each run the loop, the best of the tries that
// `seconds` leave time for, at least eight.
double ops_per_second(const Loop& loop, int threads, double seconds);

// Bytes per second that `threads` threads read from one array of `num_bytes`, each from its own
// part; a try goes through an eighth of it, the next try through the next. The best of the tries as
// above. Throws std::bad_alloc.
double bytes_per_second(int64_t num_bytes, int threads, double seconds);

}  // namespace quire
