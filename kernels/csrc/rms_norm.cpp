#include "kernels.h"

namespace quire::QUIRE_ISA {

static float sum_of_squares(const float* x, int64_t n) {
    F16 sum = broadcast(0.0f);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) sum = fma(load(x + i), load(x + i), sum);
    if (i < n) {
        const F16 last = load_first(x + i, n - i);
        sum = fma(last, last, sum);
    }
    return reduce_sum(sum);
}

void rms_norm(const RmsNorm& a, int64_t row) {
    const float* x = a.x + row * a.width;
    float* out = a.out + row * a.width;
    const float mean = sum_of_squares(x, a.width) / float(a.width);
    const float factor = 1.0f / __builtin_sqrtf(mean + a.eps);
    for (int64_t i = 0; i < a.width; ++i) out[i] = x[i] * factor * a.weight[i];
}

}  // namespace quire::QUIRE_ISA
