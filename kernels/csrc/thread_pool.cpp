#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>

namespace quire {

namespace {

// Longer than the gap between two phases, much shorter than a time slice.
constexpr auto kSpin = std::chrono::microseconds(100);
// Longer than most gaps between a step and its drafts: to wake a thread takes a part of a draft's time.
constexpr auto kYield = std::chrono::microseconds(500);
constexpr int kSpinsBeforeYield = 1000;
constexpr uint64_t kNone = uint64_t(1) << 31;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

int64_t left(uint64_t state) { return int64_t(state & 0xFFFFFFFF) - int64_t(kNone); }

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

void ThreadPool::run(const Phase* phases, int64_t count) {
    const std::lock_guard lock(turn_);
    if (workers_.empty()) {
        for (int64_t i = 0; i < count; ++i)
            for (int64_t unit = 0; unit < phases[i].units; ++unit)
                phases[i].function(phases[i].args, unit);
        return;
    }
    phases_ = phases;
    count_ = count;
    first_serial_ = next_serial_;
    next_serial_ += uint32_t(count);
    done_.store(false);
    open(0, 0);
    // Whoever holds the last units may have lost its core: after a while, offer this one.
    for (int spins = 0; !done_.load();) {
        if (take_unit(0))
            spins = 0;
        else
            ++spins < kSpinsBeforeYield ? relax() : std::this_thread::yield();
    }
}

// Nobody holds a unit now: whatever is stored here is seen by whoever takes one. The phase cannot end
// before its last part is stored.
void ThreadPool::open(int64_t phase, int opener) {
    while (phase < count_ && phases_[phase].units <= 0) ++phase;
    if (phase == count_) return done_.store(true);
    const int64_t units = phases_[phase].units;
    const uint32_t serial = first_serial_ + uint32_t(phase);
    unfinished_.store(units);
    const auto store = [&](int part, int64_t count) {
        parts_[part].left.store(uint64_t(serial) << 32 | (kNone + uint64_t(count)));
    };
    if (is_shared(units))
        store(opener, units);
    else
        for (int part = 0; part < threads_; ++part)
            store(part, part_end(units, part) - part_end(units, part - 1));
    if (units > 1 && asleep_.load() > 0) wake();
}

// Takes and runs one unit of the open phase, if there is one.
bool ThreadPool::take_unit(int thread) {
    for (int i = 0; i < threads_; ++i)
        if (take_unit_of((thread + i) % threads_, thread)) return true;
    return false;
}

bool ThreadPool::has_units() const {
    return std::any_of(parts_.get(), parts_.get() + threads_,
                       [](const Part& part) { return left(part.left.load()) > 0; });
}

bool ThreadPool::take_unit_of(int part, int thread) {
    std::atomic<uint64_t>& state = parts_[part].left;
    if (left(state.load()) <= 0) return false;
    const uint64_t taken = state.fetch_sub(1);
    if (left(taken) <= 0) return false;
    const int64_t index = uint32_t(uint32_t(taken >> 32) - first_serial_);
    const Phase& phase = phases_[index];
    const int64_t end = is_shared(phase.units) ? phase.units : part_end(phase.units, part);
    phase.function(phase.args, end - left(taken));
    if (unfinished_.fetch_sub(1) == 1) open(index + 1, thread);
    return true;
}

void ThreadPool::serve(int thread) {
    using Clock = std::chrono::steady_clock;
    auto idle_since = Clock::now();
    for (int spins = 0; !stopping_.load(); ++spins) {
        if (take_unit(thread)) {
            spins = 0;
            idle_since = Clock::now();
        } else if (spins % 64 == 63) {
            const auto idle = Clock::now() - idle_since;
            if (idle > (next_is_near_.load() ? kYield : kSpin)) {
                sleep();
                idle_since = Clock::now();
            } else if (idle > kSpin) {
                std::this_thread::yield();  // whoever else needs the core has it
            }
        } else {
            relax();
        }
    }
}

// Either this thread sees the units that were opened meanwhile, or their opener sees it asleep.
void ThreadPool::sleep() {
    const uint32_t epoch = epoch_.load();
    asleep_.fetch_add(1);
    if (!has_units() && !stopping_.load()) epoch_.wait(epoch);
    asleep_.fetch_sub(1);
}

void ThreadPool::wake() {
    epoch_.fetch_add(1);
    epoch_.notify_all();
}

void ThreadPool::resize(int threads) {
    const std::lock_guard lock(turn_);
    stopping_.store(true);
    wake();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    stopping_.store(false);
    threads_ = threads;
    parts_ = std::make_unique<Part[]>(size_t(threads));
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
}

int ThreadPool::size() {
    const std::lock_guard lock(turn_);
    return threads_;
}

}  // namespace quire
