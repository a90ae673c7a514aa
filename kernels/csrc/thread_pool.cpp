#include "thread_pool.h"

#include <pthread.h>

#include <chrono>

namespace quire {

namespace {

// Longer than the gap between two ops of a step, much shorter than a time slice.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kSpinsBeforeYield = 1000;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

ThreadPool* process_pool = nullptr;

// The parent's workers do not exist in the child and its locks may be held: leave that pool behind.
void start_over() { process_pool = new ThreadPool; }

}  // namespace

ThreadPool& ThreadPool::instance() {
    static const bool once = [] {
        start_over();
        pthread_atfork(nullptr, nullptr, start_over);
        return true;
    }();
    (void)once;
    return *process_pool;
}

void ThreadPool::Job::take_units() {
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;)
        function(call, unit);
}

void ThreadPool::run_job(Job job) {
    const std::lock_guard lock(turn_);
    if (workers_.empty() || job.units <= 1) return job.take_units();
    publish(&job);
    job.take_units();
    // A worker counts itself in before it reads job_: either it sees null, or it is seen here.
    job_.store(nullptr);
    // Whoever is still inside may have lost its core: after a while, offer this one.
    for (int spins = 0; inside_.load() != 0; ++spins)
        spins < kSpinsBeforeYield ? relax() : std::this_thread::yield();
}

void ThreadPool::publish(Job* job) {
    job_.store(job);
    epoch_.fetch_add(1);
    epoch_.notify_all();
}

void ThreadPool::serve() {
    for (int seen = 0; !stopping_.load();) {
        inside_.fetch_add(1);
        if (Job* job = job_.load()) job->take_units();
        inside_.fetch_sub(1);
        seen = wait_for_epoch_after(seen);
    }
}

int ThreadPool::wait_for_epoch_after(int seen) {
    const auto start = std::chrono::steady_clock::now();
    do {
        for (int i = 0; i < 64; ++i) {
            if (epoch_.load() != seen) return epoch_.load();
            relax();
        }
    } while (std::chrono::steady_clock::now() - start < kSpin);
    epoch_.wait(seen);
    return epoch_.load();
}

void ThreadPool::resize(int threads) {
    const std::lock_guard lock(turn_);
    stopping_.store(true);
    publish(nullptr);
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    stopping_.store(false);
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { serve(); });
}

int ThreadPool::size() {
    const std::lock_guard lock(turn_);
    return int(workers_.size()) + 1;
}

}  // namespace quire
