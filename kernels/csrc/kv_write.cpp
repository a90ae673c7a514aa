#include <cstring>

#include "kernels.h"

namespace quire::QUIRE_ISA {

static void put(float* p, float a) { *p = a; }

// Nearest, ties to even; NaN stays NaN.
static void put(bf16* p, float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    bits += 0x7FFF + ((bits >> 16) & 1);
    p->bits = a != a ? 0x7FC0 : uint16_t(bits >> 16);
}

template <class T>
static void kv_write(const KvWrite& a, int64_t row) {
    const int64_t dim = a.pages.head_dim, elements = a.pages.page_size * dim;
    const int64_t offset = a.offsets[row];
    T* page = static_cast<T*>(a.pages.kv) + a.slots[row] * a.pages.page_stride;
    for (int64_t head = 0; head < a.pages.kv_heads; ++head) {
        const float* k = a.k + (row * a.pages.kv_heads + head) * dim;
        const float* v = a.v + (row * a.pages.kv_heads + head) * dim;
        T* keys = page + head * 2 * elements + offset / 16 * (16 * dim) + offset % 16;
        T* values = page + (head * 2 + 1) * elements + offset * dim;
        for (int64_t d = 0; d < dim; ++d) put(keys + d * 16, k[d]);
        for (int64_t d = 0; d < dim; ++d) put(values + d, v[d]);
    }
}

void kv_write_f32(const KvWrite& a, int64_t row) { kv_write<float>(a, row); }
void kv_write_bf16(const KvWrite& a, int64_t row) { kv_write<bf16>(a, row); }

}  // namespace quire::QUIRE_ISA
