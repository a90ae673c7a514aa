// One pool of threads per process. Units are taken from a counter, so a thread that loses its core
// slows a step by at most the unit it holds.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace quire {

class ThreadPool {
public:
    // The pool of this process, with one thread (the caller's) until resized. Never destroyed: its
    // threads sleep until the process ends. A forked child starts over with a new one.
    static ThreadPool& instance();

    // `threads` counts the caller of `run`. Waits for a job that is running.
    void resize(int threads);
    int size();

    // Calls function(args, unit) for every unit in 0..units-1 on any threads, in any order, and
    // returns when all are done. `function` must not throw. Concurrent callers take turns.
    template <class Args>
    void run(void (*function)(const Args&, int64_t), const Args& args, int64_t units) {
        struct Call {
            void (*function)(const Args&, int64_t);
            const Args& args;
        } const call{function, args};
        run_job({[](const void* call, int64_t unit) {
                     auto& c = *static_cast<const Call*>(call);
                     c.function(c.args, unit);
                 },
                 &call, units});
    }

private:
    struct Job {
        void (*function)(const void*, int64_t);
        const void* call;
        int64_t units;
        std::atomic<int64_t> next{0};

        Job(void (*f)(const void*, int64_t), const void* c, int64_t u)
            : function(f), call(c), units(u) {}
        void take_units();
    };

    void run_job(Job job);
    void serve();
    int wait_for_epoch_after(int seen);
    void publish(Job* job);

    std::mutex turn_;  // held by the caller whose job runs, or who resizes
    std::vector<std::thread> workers_;
    std::atomic<bool> stopping_{false};
    std::atomic<Job*> job_{nullptr};  // null between jobs
    std::atomic<int> epoch_{0};       // one more for every job; what sleeping workers wait for
    std::atomic<int> inside_{0};      // workers that may hold a pointer to the job
};

}  // namespace quire
