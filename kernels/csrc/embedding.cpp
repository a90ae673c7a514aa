// One row of a packed matrix as fp32.
#include "kernels.h"

namespace quire::QUIRE_ISA {

namespace {

float scale_at(const Matrix& w, const uint8_t* scales, int64_t lane) {
    uint16_t bits[16] = {};
    __builtin_memcpy(bits, scales + 2 * lane, 2);
    float values[16];
    store(values, w.bf16_scales ? load(reinterpret_cast<const bf16*>(bits)) : load_half(bits));
    return values[0];
}

void dequantize(const Matrix& w, const uint8_t* tile, int64_t lane, float* out) {
    const bool nibbles = w.format == WeightFormat::int4;
    const int64_t per_vector = nibbles ? 8 : 4;
    for (int64_t g = 0; g < w.inputs / w.group; ++g) {
        const float scale = scale_at(w, tile, lane);
        tile += 64;
        float zero = nibbles ? 8.0f : 128.0f, minimum = 0.0f;
        if (w.offsets != Offsets::none) {
            const float offset = scale_at(w, tile, lane);
            zero = w.offsets == Offsets::zeros ? offset : 0.0f;
            minimum = w.offsets == Offsets::minimums ? offset : 0.0f;
            tile += 64;
        }
        for (int64_t k = 0; k < w.group; ++k) {
            const int64_t in_vector = k % per_vector;
            const uint8_t byte = tile[k / per_vector * 128 + lane * 4 + in_vector % 4];
            const int value = !nibbles ? byte : in_vector < 4 ? byte & 15 : byte >> 4;
            *out++ = (float(value) - zero) * scale + minimum;
        }
        tile += w.group / per_vector * 128;
    }
}

}  // namespace

void embedding(const Embedding& a, int64_t row) {
    const Matrix& w = a.table;
    const int64_t id = a.token_ids[row], lane = id % kTileOutputs;
    const uint8_t* tile = w.data + id / kTileOutputs * w.tile_bytes;
    float* out = a.scratch + row * w.inputs;
    switch (w.format) {
        case WeightFormat::f32:
            for (int64_t k = 0; k < w.inputs; ++k)
                out[k] = reinterpret_cast<const float*>(tile)[k * kTileOutputs + lane];
            break;
        case WeightFormat::bf16:
            for (int64_t k = 0; k < w.inputs; ++k)
                out[k] = to_f32(reinterpret_cast<const bf16*>(
                    tile)[k / 2 * 2 * kTileOutputs + 2 * lane + k % 2]);
            break;
        default: dequantize(w, tile, lane, out);
    }
    if (w.rotated) rotate(out, w.inputs);
    __builtin_memcpy(a.out + row * a.width, out, size_t(4 * a.width));
}

}  // namespace quire::QUIRE_ISA
