// Memory that a step reuses: grown when a larger step comes, never shrunk.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "fetch_ahead.h"
#include "ops.h"

namespace quire {

class Buffer {
public:
    // At least `count` of T, on a cache line's border; what it held before is lost.
    template <class T>
    T* of(int64_t count) {
        const size_t bytes = size_t(round_up(count * int64_t(sizeof(T)) + 64, 64));
        if (bytes > bytes_) {
            memory_.reset(std::aligned_alloc(64, bytes));
            bytes_ = memory_ ? bytes : 0;
            if (!memory_) throw std::bad_alloc();
        }
        return static_cast<T*>(memory_.get());
    }

private:
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    std::unique_ptr<void, Free> memory_;
    size_t bytes_ = 0;
};

// Inputs of products, in the form that a matrix reads.
class InputBuffer {
public:
    InputRows of(const Matrix& w, int64_t rows) {
        const int64_t groups = rows * (w.inputs / w.group);
        const int32_t sum_factor = w.offsets == Offsets::none ? -w.zero() : 1;
        return {w.reads, w.rotated, sum_factor, rows, w.inputs, w.group,
                values_.of<uint8_t>(rows * w.inputs * bytes_per_input(w.reads) + kReadBeyondInputs),
                scales_.of<float>(groups), sums_.of<int32_t>(groups), fetch_ahead_of(rows)};
    }

private:
    Buffer values_, scales_, sums_;
};

}  // namespace quire
