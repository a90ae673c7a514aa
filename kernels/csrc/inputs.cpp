// Rows of fp32 turned into inputs of a product: normalised, rotated, cut to bf16 or integers.
#include "kernels.h"

namespace quire::QUIRE_ISA {

namespace {

F16 load_some(const float* x, int64_t n) { return n >= 16 ? load(x) : load_first(x, n); }

void store_some(float* y, F16 a, int64_t n) { n >= 16 ? store(y, a) : store_first(y, a, n); }

float sum_of_squares(const float* x, int64_t n) {
    F16 sum = broadcast(0.0f);
    for (int64_t i = 0; i < n; i += 16) {
        const F16 a = load_some(x + i, n - i);
        sum = fma(a, a, sum);
    }
    return reduce_sum(sum);
}

// One for lanes whose bit `Distance` is clear, minus one for the others.
template <int Distance>
QUIRE_INLINE F16 signs() {
    alignas(64) static constexpr auto table = [] {
        struct { float lane[16]; } t{};
        for (int i = 0; i < 16; ++i) t.lane[i] = i & Distance ? -1.0f : 1.0f;
        return t;
    }();
    return load(table.lane);
}

template <int Distance>
QUIRE_INLINE void butterfly(F16 (&x)[4]) {
    for (F16& a : x) a = fma(a, signs<Distance>(), exchange<Distance>(a));
}

void rotate_block(float* x) {
    F16 a[4] = {load(x), load(x + 16), load(x + 32), load(x + 48)};
    butterfly<1>(a);
    butterfly<2>(a);
    butterfly<4>(a);
    butterfly<8>(a);
    const F16 b[4] = {a[0] + a[1], a[0] - a[1], a[2] + a[3], a[2] - a[3]};
    store(x, b[0] + b[2]);
    store(x + 16, b[1] + b[3]);
    store(x + 32, b[0] - b[2]);
    store(x + 48, b[1] - b[3]);
}

// The scale of a group and what its values are multiplied by. NaN and infinity make the scale NaN.
struct Scale {
    float scale, factor;
};

Scale scale_of(const float* x, int64_t count, float largest) {
    F16 top = broadcast(0.0f), poison = broadcast(0.0f);
    for (int64_t i = 0; i < count; i += 16) {
        const F16 a = load(x + i);
        top = larger(top, larger(a, broadcast(0.0f) - a));
        poison = fma(a, broadcast(0.0f), poison);
    }
    const float magnitude = reduce_larger(top), zero_or_nan = reduce_sum(poison);
    if (zero_or_nan != 0.0f) return {zero_or_nan, 0.0f};
    if (!(magnitude > 0x1p-100f)) return {0.0f, 0.0f};
    return {magnitude / largest, largest / magnitude};
}

int32_t put_bytes(const float* x, int64_t count, float factor, int8_t* out) {
    I16 sum = broadcast_int(0);
    for (int64_t i = 0; i < count; i += 16) {
        const I16 a = to_int(load(x + i) * broadcast(factor));
        store_bytes(out + i, a);
        sum = sum + a;
    }
    return reduce_sum(sum);
}

// [high, low][4] after each other: value = 256 high + low, both signed.
int32_t put_planes(const float* x, int64_t count, float factor, int8_t* out) {
    I16 sum = broadcast_int(0);
    for (int64_t i = 0; i < count; i += 16) {
        const I16 a = to_int(load(x + i) * broadcast(factor));
        const I16 low = shift_right<24>(shift_left<24>(a)), high = shift_right<8>(a - low);
        int8_t planes[2][16];
        store_bytes(planes[0], high);
        store_bytes(planes[1], low);
        for (int64_t j = 0; j < 4; ++j)
            for (int plane = 0; plane < 2; ++plane)
                __builtin_memcpy(out + 2 * i + 8 * j + 4 * plane, planes[plane] + 4 * j, 4);
        sum = sum + a;
    }
    return reduce_sum(sum);
}

void pack_integers(const float* x, int64_t start, int64_t count, const InputRows& out,
                   int64_t row) {
    const bool wide = out.format == InputFormat::int16;
    const int64_t groups = out.inputs / out.group;
    auto values = reinterpret_cast<int8_t*>(out.values + row * out.row_bytes);
    for (int64_t i = 0; i < count; i += out.group) {
        const Scale s = scale_of(x + i, out.group, wide ? kLargest16 : kLargest8);
        const int64_t at = row * groups + (start + i) / out.group;
        out.scales[at] = s.scale;
        out.sums[at] = wide ? put_planes(x + i, out.group, s.factor, values + 2 * (start + i))
                            : put_bytes(x + i, out.group, s.factor, values + start + i);
    }
}

}  // namespace

void normalise(const float* x, const float* weight, float eps, int64_t width, float* y) {
    const float mean = sum_of_squares(x, width) / float(width);
    const F16 factor = broadcast(1.0f / __builtin_sqrtf(mean + eps));
    for (int64_t i = 0; i < width; i += 16) {
        const int64_t n = width - i;
        store_some(y + i, load_some(x + i, n) * factor * load_some(weight + i, n), n);
    }
}

void rotate(float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += kRotation) rotate_block(x + i);
}

void pack_inputs(float* x, int64_t start, int64_t count, const InputRows& out, int64_t row) {
    if (out.rotated) rotate(x, count);
    uint8_t* values = out.values + row * out.row_bytes;
    switch (out.format) {
        case InputFormat::f32:
            __builtin_memcpy(values + 4 * start, x, size_t(4 * count));
            break;
        case InputFormat::bf16: {
            auto narrow = reinterpret_cast<bf16*>(values) + start;
            for (int64_t i = 0; i < count; ++i) narrow[i] = round_to_bf16(x[i]);
            break;
        }
        default: pack_integers(x, start, count, out, row);
    }
}

void rms_norm(const RmsNorm& a, int64_t row) {
    normalise(a.x + row * a.width, a.weight, a.eps, a.width, a.out + row * a.width);
}

void pack_rows(const PackRows& a, int64_t row) {
    constexpr int64_t kPiece = 1024;  // a multiple of every group and of a rotation's block
    alignas(64) float piece[kPiece];
    const float* x = a.x + (a.rows ? a.rows[row] : row) * a.width;
    F16 factor = broadcast(1.0f);
    if (a.norm) {
        const float mean = sum_of_squares(x, a.width) / float(a.width);
        factor = broadcast(1.0f / __builtin_sqrtf(mean + a.eps));
    }
    for (int64_t start = 0; start < a.out.inputs; start += kPiece) {
        const int64_t count = smaller_of(kPiece, a.out.inputs - start);
        for (int64_t i = 0; i < count; i += 16) {
            const int64_t at = start + i, n = a.width - at;
            F16 value = n > 0 ? load_some(x + at, n) : broadcast(0.0f);
            if (a.norm && n > 0) value = value * factor * load_some(a.norm + at, n);
            store(piece + i, value);
        }
        pack_inputs(piece, start, count, a.out, row);
    }
}

}  // namespace quire::QUIRE_ISA
