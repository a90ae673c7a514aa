#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace quire {

namespace {

#if defined(__x86_64__)
bool has_avx512_vnni() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
bool has_amx_int8() { return has_avx512_bf16() && may_use_matrix_tiles(); }
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}
bool has_avx2_vnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
#endif

std::atomic<const Isa*>& chosen() {
    static std::atomic<const Isa*> isa = &*std::find_if(
        isas().begin(), isas().end(), [](const Isa& candidate) { return candidate.supported(); });
    return isa;
}

}  // namespace

const std::vector<Isa>& isas() {
    static const std::vector<Isa> all{
#if defined(__x86_64__)
        {"amx_int8", &amx_int8::kernels, has_amx_int8},
        {"avx512_bf16", &avx512_bf16::kernels, has_avx512_bf16},
        {"avx512_vnni", &avx512_vnni::kernels, has_avx512_vnni},
        {"avx2_vnni", &avx2_vnni::kernels, has_avx2_vnni},
        {"avx2", &avx2::kernels, has_avx2},
#endif
        {"portable", &portable::kernels, [] { return true; }},
    };
    return all;
}

const Isa& current_isa() { return *chosen().load(); }

bool may_use_matrix_tiles() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, the state
    constexpr unsigned kTilesAndInt8 = 3u << 24;                // AMX-TILE and AMX-INT8
    static const bool may = [] {
        unsigned a, b, c, d;
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTilesAndInt8) == kTilesAndInt8 &&
               syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return may;
#else
    return false;
#endif
}

void select_isa(const std::string& name) {
    for (const Isa& isa : isas())
        if (isa.name == name) {
            if (!isa.supported()) throw std::invalid_argument("this CPU does not have " + name);
            chosen().store(&isa);
            return;
        }
    throw std::invalid_argument("no kernels for instruction set " + name);
}

}  // namespace quire
