// Products of up to 16 rows of integers at once in the CPU's matrix tiles (Intel AMX); included by
// multiply.cpp where the instruction set has them. The sums are the integers that every other
// instruction set finds, and they are scaled in the same order.

// Tiles 0 to 3 hold sums of 16 rows and 16 outputs: of both columns of the first plane of inputs, then
// of the second; 4 and 5 the planes' inputs of 16 rows, `bytes` of each; 6 and 7 both columns' weights.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 0, 0, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 0, 0};

    explicit TileShapes(int64_t bytes) {
        row_bytes[4] = row_bytes[5] = uint16_t(bytes);
        rows[6] = rows[7] = uint8_t(bytes / 4);
    }
};

// Shapes belong to a thread.
QUIRE_INLINE void shape_tiles(int64_t bytes) {
    static thread_local int64_t shaped = 0;
    if (shaped == bytes) return;
    const TileShapes shapes(bytes);
    _tile_loadconfig(&shapes);
    shaped = bytes;
}

// Sums over a group, one of each plane: [planes][16 rows][32].
template <int Planes>
struct TileSums {
    alignas(64) int32_t of[Planes][16][kTileOutputs];
};

// `weights`: [group / 4][32][4]; `inputs`: [planes][rows][group]; `bytes` of a row at once.
template <int Planes>
QUIRE_INLINE void sum_group_in_tiles(int64_t group, int64_t bytes, const uint8_t* weights,
                                     const uint8_t* inputs, int64_t rows,
                                     TileSums<Planes>& sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < group; k += bytes, weights += bytes * kTileOutputs, inputs += bytes) {
        _tile_loadd(4, inputs, group);
        _tile_loadd(6, weights, 128);
        _tile_loadd(7, weights + 64, 128);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if constexpr (Planes == 2) {
            _tile_loadd(5, inputs + rows * group, group);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, sums.of[0][0], 128);
    _tile_stored(1, sums.of[0][0] + 16, 128);
    if constexpr (Planes == 2) {
        _tile_stored(2, sums.of[1][0], 128);
        _tile_stored(3, sums.of[1][0] + 16, 128);
    }
}

// Bytes [group / 4][32][4] of a group's nibbles.
QUIRE_INLINE const uint8_t* spread_nibbles(const uint8_t* weights, int64_t group, uint8_t* bytes) {
    for (int64_t at = 0; at < group * 16; at += 128)
        for (int64_t i = at; i < at + 128; i += 64) {
            const Packed both = load_weights(weights + i);
            _mm512_store_si512(bytes + at + i, low_nibbles<ByteInputs>(both).all);
            _mm512_store_si512(bytes + at + i + 128, high_nibbles<ByteInputs>(both).all);
        }
    return bytes;
}

// A group of weights in a tile's run of bytes.
struct GroupAt {
    const uint8_t *scales, *offsets, *values;
};

// Adds a group's sums, scaled, to the outputs.
template <int Planes>
QUIRE_INLINE void add_group(const Matrix& w, const GroupAt& at, const TileSums<Planes>& sums,
                            int64_t rows, const float* scales, const int32_t* input_sums,
                            float* out, int64_t stride) {
    const bool centred = w.offsets == Offsets::none;
    F16 scale[2], offset[2];
    for (int c = 0; c < 2; ++c) scale[c] = load_scales(at.scales + 32 * c, w.bf16_scales);
    if (!centred) load_offsets(w, at.offsets, scale, offset);
    for (int64_t r = 0; r < rows; ++r) {
        const F16 s = broadcast(scales[r]);
        const I16 start = broadcast_int(centred ? input_sums[r] : 0);
        for (int c = 0; c < 2; ++c) {
            I16 all = load_ints(sums.of[Planes - 1][r] + 16 * c) + start;
            if constexpr (Planes == 2)
                all = all + shift_left<8>(load_ints(sums.of[0][r] + 16 * c));
            float* to = out + r * stride + 16 * c;
            F16 total = fma(to_float(all), scale[c] * s, load(to));
            if (!centred) total = fma(offset[c], broadcast(scales[r] * float(input_sums[r])), total);
            store(to, total);
        }
    }
}

template <int Planes, bool Nibbles>
void multiply_in_tiles(const Matrix& w, const uint8_t* tile, const InputTile& x, float* out,
                       int64_t stride) {
    const int64_t bytes_at_once = smaller_of(w.group, 64);
    shape_tiles(bytes_at_once);
    TileSums<Planes> sums[2];  // of this group and the last: while one is added up, one is scaled
    alignas(64) uint8_t bytes[Nibbles ? 128 * kTileOutputs : 1];
    const int64_t offset_bytes = w.offsets == Offsets::none ? 0 : 64;
    const int64_t group_bytes = w.group / (Nibbles ? 8 : 4) * 128 + 64 + offset_bytes;
    const auto group_at = [&](int64_t g) {
        const uint8_t* start = tile + g * group_bytes;
        return GroupAt{start, start + 64, start + 64 + offset_bytes};
    };
    const auto scale_last = [&](int64_t g) __attribute__((always_inline)) {
        add_group(w, group_at(g), sums[g % 2], x.rows, x.scales + g * x.rows,
                  x.sums + g * x.rows, out, stride);
    };
    for (int64_t r = 0; r < x.rows; ++r)
        for (int c = 0; c < 2; ++c) store(out + r * stride + 16 * c, broadcast(0.0f));
    const int64_t groups = w.inputs / w.group;
    for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* values = group_at(g).values;
        if constexpr (Nibbles) values = spread_nibbles(values, w.group, bytes);
        sum_group_in_tiles(w.group, bytes_at_once, values, x.values + g * w.group * x.rows * Planes, x.rows,
                           sums[g % 2]);
        if (g > 0) scale_last(g - 1);
    }
    scale_last(groups - 1);
}
