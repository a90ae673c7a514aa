// Compiled without any instruction set beyond the build's own; each loop names what it needs and
// runs only after the CPU was asked for it.
#include "peaks.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace quire {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kChains = 12;  // sums at once: enough to hide the latency, few enough for registers
constexpr int kMinTries = 8;
// A try is shorter than a time slice, so that on a busy machine some are not interrupted.
constexpr double kTryS = 0.002;
constexpr int kReads = 8;  // tries that together read the whole array once

double since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

#if defined(__x86_64__)

// Products of operands that stay in registers, added to kChains sums by turns. The compiler must not
// see that all sums or products are equal: it would make one of them; nor begin products before their
// turn, or keep sums in an array: they would not stay in registers. A macro, because a function with a target
// is not inlined into one without it.
#define QUIRE_TWELVE(f) f(s0) f(s1) f(s2) f(s3) f(s4) f(s5) f(s6) f(s7) f(s8) f(s9) f(s10) f(s11)
#define QUIRE_OPAQUE(s) asm volatile("" : "+v"(s));
#define QUIRE_ADD(s) s0 = s0 + s;
#define QUIRE_LOOP(name, features, Vector, operand, multiply_add)                        \
    __attribute__((target(features))) void name(int64_t rounds) {                        \
        Vector s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, s10{}, s11{}; \
        Vector a = operand;                                                              \
        QUIRE_TWELVE(QUIRE_OPAQUE)                                                       \
        for (; rounds > 0; --rounds) {                                                   \
            QUIRE_TWELVE(multiply_add)                                                   \
        }                                                                                \
        QUIRE_TWELVE(QUIRE_ADD)                                                          \
        asm volatile("" : : "x"(s0));                                                    \
    }
#define QUIRE_PRODUCT(s, product) \
    QUIRE_OPAQUE(a)               \
    s = product;                  \
    QUIRE_OPAQUE(s)

#define QUIRE_DPBUSD_512(s) QUIRE_PRODUCT(s, _mm512_dpbusd_epi32(s, a, a))
#define QUIRE_DPBUSD_256(s) QUIRE_PRODUCT(s, _mm256_dpbusd_avx_epi32(s, a, a))
#define QUIRE_MADD_512(s) QUIRE_PRODUCT(s, _mm512_add_epi32(s, _mm512_madd_epi16(a, a)))
#define QUIRE_MADD_256(s) QUIRE_PRODUCT(s, _mm256_add_epi32(s, _mm256_madd_epi16(a, a)))
#define QUIRE_DPBF16(s) QUIRE_PRODUCT(s, _mm512_dpbf16_ps(s, (__m512bh)a, (__m512bh)a))
#define QUIRE_FMA_512(s) QUIRE_PRODUCT(s, _mm512_fmadd_ps(s, a, a))
#define QUIRE_FMA_256(s) QUIRE_PRODUCT(s, _mm256_fmadd_ps(s, a, a))

QUIRE_LOOP(int8_avx512_vnni, "avx512f,avx512vnni", __m512i, _mm512_set1_epi8(1), QUIRE_DPBUSD_512)
QUIRE_LOOP(int8_avx_vnni, "avx2,avxvnni", __m256i, _mm256_set1_epi8(1), QUIRE_DPBUSD_256)
QUIRE_LOOP(int8_avx512bw, "avx512f,avx512bw", __m512i, _mm512_set1_epi16(1), QUIRE_MADD_512)
QUIRE_LOOP(int8_avx2, "avx2", __m256i, _mm256_set1_epi16(1), QUIRE_MADD_256)
QUIRE_LOOP(bf16_avx512, "avx512f,avx512bf16", __m512, _mm512_set1_ps(1e-3f), QUIRE_DPBF16)
QUIRE_LOOP(fp32_avx512, "avx512f", __m512, _mm512_set1_ps(1e-3f), QUIRE_FMA_512)
QUIRE_LOOP(fp32_fma, "avx2,fma", __m256, _mm256_set1_ps(1e-3f), QUIRE_FMA_256)

#undef QUIRE_LOOP

// Four sums of 16 x 16, so that none waits for the last product with it.
__attribute__((target("amx-tile,amx-int8"))) void int8_tiles(int64_t rounds) {
    alignas(64) static const struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
    } shapes;
    _tile_loadconfig(&shapes);
    for (; rounds > 0; --rounds) {
        _tile_dpbsud(0, 4, 5);
        _tile_dpbsud(1, 4, 5);
        _tile_dpbsud(2, 4, 5);
        _tile_dpbsud(3, 4, 5);
    }
    _tile_release();
}

#endif

// Without intrinsics: dot products of arrays in the first cache, as the compiler vectorises them.
constexpr int kCount = 4096, kLanes = 64;

template <class Value, class Sum>
void dot_products(int64_t rounds) {
    alignas(64) static Value a[kCount], b[kCount];
    alignas(64) Sum sums[kLanes] = {};
    for (; rounds > 0; --rounds) {
        asm volatile("" : : "r"(a), "r"(b), "r"(sums) : "memory");
        for (int i = 0; i < kCount; i += kLanes)
            for (int lane = 0; lane < kLanes; ++lane)
                sums[lane] += Sum(a[i + lane]) * Sum(b[i + lane]);
    }
    asm volatile("" : : "r"(sums) : "memory");
}

constexpr int64_t ops(int64_t multiply_adds) { return 2 * kChains * multiply_adds; }

struct Candidate {
    Loop loop;
    bool supported;
};

// Best first.
std::vector<Candidate> candidates() {
    return {
#if defined(__x86_64__)
        {{"int8", "vpdpbusd zmm", int8_avx512_vnni, ops(64)},
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni")},
        {{"int8 tiles", "tdpbsud", int8_tiles, 4 * 2 * 16 * 16 * 64}, may_use_matrix_tiles()},
        {{"int8", "vpmaddwd zmm", int8_avx512bw, ops(32)},
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")},
        {{"int8", "vpdpbusd ymm", int8_avx_vnni, ops(32)},
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("avxvnni")},
        {{"int8", "vpmaddwd ymm", int8_avx2, ops(16)}, bool(__builtin_cpu_supports("avx2"))},
        {{"bf16", "vdpbf16ps zmm", bf16_avx512, ops(32)},
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16")},
        {{"fp32", "vfmadd zmm", fp32_avx512, ops(16)}, bool(__builtin_cpu_supports("avx512f"))},
        {{"fp32", "vfmadd ymm", fp32_fma, ops(8)},
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
        {{"int8", "portable", dot_products<int8_t, int32_t>, 2 * kCount}, true},
        {{"fp32", "portable", dot_products<float, float>, 2 * kCount}, true},
    };
}

// Seconds from the moment all threads may begin until the last one is done with work(thread).
double timed(int threads, const std::function<void(int)>& work) {
    std::atomic<int> ready{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> others;
    auto run = [&](int thread) {
        ready.fetch_add(1);
        while (!go.load()) std::this_thread::yield();
        work(thread);
    };
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
    while (ready.load() != threads - 1) std::this_thread::yield();
    const auto start = Clock::now();
    go.store(true);
    work(0);
    for (auto& other : others) other.join();
    return since(start);
}

double best_of(double seconds, const std::function<double()>& attempt) {
    const auto start = Clock::now();
    double best = attempt();
    for (int tries = 1; tries < kMinTries || since(start) < seconds; ++tries)
        best = std::min(best, attempt());
    return best;
}

// Mapped memory, in huge pages where the system grants them.
class Mapping {
public:
    explicit Mapping(int64_t num_bytes) : size_(num_bytes) {
        base_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        madvise(base_, size_, MADV_HUGEPAGE);
#endif
    }
    ~Mapping() { munmap(base_, size_); }
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
    char* data() { return static_cast<char*>(base_); }

private:
    void* base_;
    size_t size_;
};

// Sixteen bytes at a time: the memory is the limit, not the loads.
void read_all(const char* begin, const char* end) {
    typedef uint64_t Pair __attribute__((vector_size(16)));
    Pair a{}, b{}, c{}, d{};
    for (auto at = reinterpret_cast<const Pair*>(begin); at + 4 <= reinterpret_cast<const Pair*>(end);
         at += 4) {
        a += at[0];
        b += at[1];
        c += at[2];
        d += at[3];
    }
    a += b + c + d;
    asm volatile("" : : "r"(a[0]), "r"(a[1]));
}

}  // namespace

const Loop* best_loop(const char* arithmetic) {
    static const auto all = candidates();
    for (const Candidate& candidate : all)
        if (candidate.supported && !std::strcmp(candidate.loop.arithmetic, arithmetic))
            return &candidate.loop;
    return nullptr;
}

double ops_per_second(const Loop& loop, int threads, double seconds) {
    int64_t rounds = 1;
    while (timed(1, [&](int) { loop.run(rounds); }) < kTryS) rounds *= 2;
    const double took =
        best_of(seconds, [&] { return timed(threads, [&](int) { loop.run(rounds); }); });
    return double(loop.ops_per_round) * double(rounds) * threads / took;
}

double bytes_per_second(int64_t num_bytes, int threads, double seconds) {
    const int64_t part = num_bytes / threads / kReads / 64 * 64;
    Mapping memory(num_bytes);
    const auto begin = [&](int thread, int read) {
        return memory.data() + (thread * kReads + read) * part;
    };
    timed(threads, [&](int thread) { std::memset(begin(thread, 0), 1, part * kReads); });
    int tries = 0;
    const double took = best_of(seconds, [&] {
        const int read = tries++ % kReads;
        return timed(threads, [&](int thread) {
            read_all(begin(thread, read), begin(thread, read) + part);
        });
    });
    return double(part) * threads / took;
}

}  // namespace quire
