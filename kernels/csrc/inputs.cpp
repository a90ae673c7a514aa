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
QUIRE_INLINE void butterflies(F16* x) {
    for (int i = 0; i < 4; ++i) x[i] = fma(x[i], signs<Distance>(), exchange<Distance>(x[i]));
}

// x = H x, of four vectors.
QUIRE_INLINE void rotate_block(F16* x) {
    butterflies<1>(x);
    butterflies<2>(x);
    butterflies<4>(x);
    butterflies<8>(x);
    const F16 a[4] = {x[0] + x[1], x[0] - x[1], x[2] + x[3], x[2] - x[3]};
    x[0] = a[0] + a[2];
    x[1] = a[1] + a[3];
    x[2] = a[0] - a[2];
    x[3] = a[1] - a[3];
}

// The scale of a group and what its values are multiplied by. NaN and infinity make the scale NaN.
struct Scale {
    float scale, factor;
};

QUIRE_INLINE Scale scale_of(int32_t magnitude_bits, float largest) {
    float magnitude;
    __builtin_memcpy(&magnitude, &magnitude_bits, sizeof magnitude);
    if (magnitude_bits >= 0x7F800000) return {__builtin_nanf(""), 0.0f};
    if (!(magnitude > 0x1p-100f)) return {0.0f, 0.0f};
    return {magnitude / largest, largest / magnitude};
}

// Four bytes of a row in turn with those of the tile's other rows.
template <int Count>
QUIRE_INLINE void put_units(const void* values, uint8_t* out, int64_t stride) {
    auto bytes = static_cast<const uint8_t*>(values);
    for (int i = 0; i < Count; ++i) __builtin_memcpy(out + i * stride, bytes + 4 * i, 4);
}

// Both bytes of 16 bits are signed.
QUIRE_INLINE void put_planes(I16 a, uint8_t* out, int64_t stride) {
    const I16 low = shift_right<24>(shift_left<24>(a)), high = shift_right<8>(a - low);
    int8_t bytes[16];
    store_bytes(bytes, high);
    put_units<4>(bytes, out, stride);
    store_bytes(bytes, low);
    put_units<4>(bytes, out + 4, stride);
}

// Sixteen inputs of a row in matrix tiles; of 16 bits, the low bytes follow `plane` bytes later.
template <bool Wide>
QUIRE_INLINE void put_tile_row(I16 a, uint8_t* out, int64_t plane) {
    auto bytes = reinterpret_cast<int8_t*>(out);
    if constexpr (Wide) {
        const I16 low = shift_right<24>(shift_left<24>(a));
        store_bytes(bytes, shift_right<8>(a - low));
        store_bytes(bytes + plane, low);
    } else {
        store_bytes(bytes, a);
    }
}

// 16 bits each, in the order 0, 2, 1, 3 of every four: pairs as bytes widened to 16 bits stand.
QUIRE_INLINE void put_words(I16 a, uint8_t* out, int64_t stride) {
    int16_t words[16];
    store_words(words, a);
    for (int i = 0; i < 16; i += 4, out += stride) {
        const int16_t four[4] = {words[i], words[i + 2], words[i + 1], words[i + 3]};
        __builtin_memcpy(out, four, sizeof four);
    }
}

template <int Vectors, bool Wide>
QUIRE_INLINE void pack_group(const float* x, const InputRows& all, uint8_t* out, int64_t rows,
                             bool in_tiles, float* scale, int32_t* sum) {
    F16 a[Vectors];
    for (int i = 0; i < Vectors; ++i) a[i] = load(x + 16 * i);
    if constexpr (Vectors % 4 == 0)
        for (int i = 0; all.rotated && i < Vectors; i += 4) rotate_block(a + i);
    I16 top = magnitude_bits(a[0]), total = broadcast_int(0);
    for (int i = 1; i < Vectors; ++i) top = larger(top, magnitude_bits(a[i]));
    const Scale s = scale_of(reduce_larger(top), Wide ? kLargest16 : kLargest8);
    [[maybe_unused]] int8_t bytes[16 * Vectors];
    for (int i = 0; i < Vectors; ++i) {
        const I16 value = to_int(a[i] * broadcast(s.factor));
        total = total + value;
        if (in_tiles) {
            put_tile_row<Wide>(value, out + 16 * i, 16 * Vectors * rows);
        } else if constexpr (Wide && kPlanes16 == 1)
            put_words(value, out + 32 * i * rows, 8 * rows);
        else if constexpr (Wide)
            put_planes(value, out + 32 * i * rows, 8 * rows);
        else
            store_bytes(bytes + 16 * i, value);
    }
    if constexpr (!Wide)
        if (!in_tiles) put_units<4 * Vectors>(bytes, out, 4 * rows);
    *scale = s.scale;
    *sum = int32_t(uint32_t(all.sum_factor) * uint32_t(reduce_sum(total)));  // NaN may be any
}

template <int Vectors, bool Wide>
void pack_groups(const float* x, int64_t start, int64_t count, const InputRows& all,
                 const InputTile& out, int64_t row) {
    constexpr int64_t kGroup = 16 * Vectors, kUnit = Wide ? 8 : 4;
    const bool in_tiles = in_matrix_tiles(all.format, out.rows);
    for (int64_t i = 0; i < count; i += kGroup) {
        const int64_t at = start + i, group = at / kGroup * out.rows + row;
        uint8_t* to = in_tiles ? out.values + at * out.rows * (Wide ? 2 : 1) + row * kGroup
                               : out.values + (at / 4 * out.rows + row) * kUnit;
        pack_group<Vectors, Wide>(x + i, all, to, out.rows, in_tiles, out.scales + group,
                                  out.sums + group);
    }
}

template <bool Wide>
void pack_integers(const float* x, int64_t start, int64_t count, const InputRows& all,
                   const InputTile& out, int64_t row) {
    switch (all.group) {
        case 32: return pack_groups<2, Wide>(x, start, count, all, out, row);
        case 64: return pack_groups<4, Wide>(x, start, count, all, out, row);
        case 128: return pack_groups<8, Wide>(x, start, count, all, out, row);
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
    for (float* end = x + count; x < end; x += kRotation) {
        F16 a[4] = {load(x), load(x + 16), load(x + 32), load(x + 48)};
        rotate_block(a);
        for (int i = 0; i < 4; ++i) store(x + 16 * i, a[i]);
    }
}

void pack_inputs(const float* x, int64_t start, int64_t count, const InputRows& all, int64_t row) {
    const InputTile out = tile_at(all, row);
    row -= out.row;
    const int64_t stride = 4 * out.rows;
    switch (all.format) {
        case InputFormat::f32: {
            uint8_t* at = out.values + start * stride + 4 * row;
            for (int64_t i = 0; i < count; i += 16) put_units<16>(x + i, at + i * stride, stride);
            break;
        }
        case InputFormat::bf16: {
            uint8_t* at = out.values + start / 2 * stride + 4 * row;
            for (int64_t i = 0; i < count; i += 16) {
                bf16 narrow[16];
                for (int j = 0; j < 16; ++j) narrow[j] = round_to_bf16(x[i + j]);
                put_units<8>(narrow, at + i / 2 * stride, stride);
            }
            break;
        }
        case InputFormat::int8: return pack_integers<false>(x, start, count, all, out, row);
        case InputFormat::int16: return pack_integers<true>(x, start, count, all, out, row);
    }
}

void rms_norm(const RmsNorm& a, int64_t row) {
    normalise(a.x + row * a.width, a.weight, a.eps, a.width, a.out + row * a.width);
}

static void pack_row(const PackRows& a, int64_t row) {
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

void pack_rows(const PackRows& a, int64_t unit) {
    const int64_t start = unit * tile_rows(a.out.format);
    const int64_t end = smaller_of(start + tile_rows(a.out.format), a.out.rows);
    for (int64_t row = start; row < end; ++row)
        pack_row(a, row);
}

}  // namespace quire::QUIRE_ISA
