#include "exp.h"
#include "kernels.h"

namespace quire::QUIRE_ISA {

// x / (1 + exp(-x)) with the exponent never positive: e = exp(-|x|), so x < 0 gives x e / (1 + e).
QUIRE_INLINE F16 silu(F16 x) {
    const F16 zero = broadcast(0.0f), one = broadcast(1.0f);
    const F16 e = exp_negative(if_less(x, zero, x, zero - x));
    return x * if_less(x, zero, e, one) / (one + e);
}

void silu_mul(const SiluMul& a, int64_t unit) {
    int64_t i = unit * SiluMul::kUnitElements;
    const int64_t end = i + SiluMul::kUnitElements < a.count ? i + SiluMul::kUnitElements : a.count;
    for (; i + 16 <= end; i += 16) store(a.out + i, silu(load(a.gate + i)) * load(a.up + i));
    if (i < end) {
        const int64_t n = end - i;
        store_first(a.out + i, silu(load_first(a.gate + i, n)) * load_first(a.up + i, n), n);
    }
}

}  // namespace quire::QUIRE_ISA
