// One pool of threads per process. A job is a list of phases; a phase's units run on any threads, in
// any order; a phase starts when the one before it is done. Every thread begins with a part of the
// units, in their order, so that it reads on in memory where it stopped; when that is done it takes
// from the others' parts. The thread that finishes a phase's last unit opens the next, so a thread
// that lost its core holds up a step by at most the unit it holds.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace quire {

struct Phase {
    void (*function)(const void* args, int64_t unit);
    const void* args;
    int64_t units;  // fewer than 2^31; a phase without any is passed over
};

// A phase of one of the kernels' unit functions; `args` must outlive the job.
template <auto Function, class Args>
void call_unit(const void* args, int64_t unit) {
    Function(*static_cast<const Args*>(args), unit);
}

class ThreadPool {
public:
    // The pool of this process, with one thread (the caller's) until resized. Never destroyed: its
    // threads sleep until the process ends. A forked child starts over with a new one.
    static ThreadPool& instance();

    // `threads` counts the caller of `run`. Waits for a job that is running.
    void resize(int threads);
    int size();

    // Runs the phases in order and returns when all are done. Functions must not throw. Concurrent
    // callers take turns.
    void run(const Phase* phases, int64_t count);

    // One phase: function(args, unit) for every unit in 0..units-1.
    template <class Args>
    void run(void (*function)(const Args&, int64_t), const Args& args, int64_t units) {
        struct Call {
            void (*function)(const Args&, int64_t);
            const Args& args;
        } const call{function, args};
        const Phase phase{[](const void* call, int64_t unit) {
                              auto& c = *static_cast<const Call*>(call);
                              c.function(c.args, unit);
                          },
                          &call, units};
        run(&phase, 1);
    }

    // Whether another job is known to follow soon: idle threads wait longer before they sleep then.
    void expect_next(bool is_near) { next_is_near_.store(is_near); }

private:
    // The phase's serial number above, the units nobody has taken, plus kNone, below. Whoever lowers
    // it to less than kNone has taken nothing.
    struct alignas(64) Part {
        std::atomic<uint64_t> left{0};
    };

    void open(int64_t phase, int opener);
    bool take_unit(int thread);
    bool take_unit_of(int part, int thread);
    void serve(int thread);
    bool has_units() const;
    void sleep();
    void wake();
    // Too few units for parts: all are in its opener's.
    bool is_shared(int64_t units) const { return units < threads_; }
    int64_t part_end(int64_t units, int part) const { return units * (part + 1) / threads_; }

    std::mutex turn_;  // held by the caller whose job runs, or who resizes
    std::vector<std::thread> workers_;
    std::atomic<bool> stopping_{false};

    int threads_ = 1;
    std::unique_ptr<Part[]> parts_;
    alignas(64) std::atomic<int64_t> unfinished_{0};  // units of the open phase
    alignas(64) std::atomic<uint32_t> epoch_{0};      // what sleeping workers wait on
    std::atomic<int> asleep_{0};
    std::atomic<bool> done_{true};
    std::atomic<bool> next_is_near_{false};

    // Of the job that runs; whoever has taken a unit may read them.
    const Phase* phases_ = nullptr;
    int64_t count_ = 0;
    uint32_t first_serial_ = 0;  // of phase 0
    uint32_t next_serial_ = 0;   // of the next job's; guarded by turn_
};

}  // namespace quire
