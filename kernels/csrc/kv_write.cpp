#include "kernels.h"

namespace quire::QUIRE_ISA {

// Where one token's K or V stands in the record of a head: elements `Stride` apart.
template <int Stride>
struct Place {
    uint8_t* record;
    int64_t element;  // the first one
    int64_t scale;    // behind all elements
};

static uint8_t* record_of(const Pages& pages, int64_t slot, int64_t head) {
    return pages.base + slot * pages.page_bytes + head * pages.head_bytes;
}

static void put(float* p, float a) { *p = a; }
static void put(bf16* p, float a) { *p = round_to_bf16(a); }

template <class T, int Stride>
static void put_floats(const Place<Stride>& place, const float* x, int64_t dim) {
    T* to = reinterpret_cast<T*>(place.record) + place.element;
    for (int64_t d = 0; d < dim; ++d) put(to + d * Stride, x[d]);
}

// max |x| / 127, or NaN if any x is not finite.
static float scale_of(const float* x, int64_t dim) {
    F16 top = broadcast(0.0f), zero_or_nan = broadcast(0.0f);
    for (int64_t d = 0; d < dim; d += 16) {
        const F16 a = load_first(x + d, smaller_of(dim - d, 16));
        top = larger(top, larger(a, broadcast(0.0f) - a));
        zero_or_nan = zero_or_nan + a * broadcast(0.0f);
    }
    return reduce_larger(top) / 127.0f + reduce_sum(zero_or_nan);
}

// Within -127..127 even where a subnormal scale is too coarse.
static I16 integers_of(F16 a, F16 scale) {
    const F16 most = broadcast(127.0f), least = broadcast(-127.0f);
    F16 ratio = a / scale;
    ratio = if_less(ratio, least, least, ratio);
    return to_int(if_less(most, ratio, most, ratio));
}

template <int Stride>
static void put_integers(const Pages& pages, const Place<Stride>& place, const float* x) {
    const int64_t dim = pages.head_dim;
    const float scale = scale_of(x, dim);
    int8_t* to = reinterpret_cast<int8_t*>(place.record) + place.element;
    for (int64_t d = 0; d < dim; d += 16) {
        const int64_t count = smaller_of(dim - d, 16);
        int8_t integers[16] = {};
        if (scale > 0) store_bytes(integers, integers_of(load_first(x + d, count), broadcast(scale)));
        for (int64_t i = 0; i < count; ++i) to[(d + i) * Stride] = integers[i];
    }
    reinterpret_cast<float*>(place.record + 2 * pages.page_size * dim)[place.scale] = scale;
}

template <int Stride>
static void put(const Pages& pages, const Place<Stride>& place, const float* x) {
    switch (pages.format) {
        case KvFormat::f32: return put_floats<float>(place, x, pages.head_dim);
        case KvFormat::bf16: return put_floats<bf16>(place, x, pages.head_dim);
        case KvFormat::int8: return put_integers(pages, place, x);
    }
}

void put_key(const Pages& pages, int64_t slot, int64_t offset, int64_t head, const float* k) {
    const int64_t element = offset / 16 * (16 * pages.head_dim) + offset % 16;
    put(pages, Place<16>{record_of(pages, slot, head), element, offset}, k);
}

void put_value(const Pages& pages, int64_t slot, int64_t offset, int64_t head, const float* v) {
    const int64_t token = pages.page_size + offset;
    put(pages, Place<1>{record_of(pages, slot, head), token * pages.head_dim, token}, v);
}

void kv_write(const KvWrite& a, int64_t row) {
    for (int64_t head = 0; head < a.pages.kv_heads; ++head) {
        const int64_t at = (row * a.pages.kv_heads + head) * a.pages.head_dim;
        put_key(a.pages, a.slots[row], a.offsets[row], head, a.k + at);
        put_value(a.pages, a.slots[row], a.offsets[row], head, a.v + at);
    }
}

}  // namespace quire::QUIRE_ISA
