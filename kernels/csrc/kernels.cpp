#include "kernels.h"

namespace quire::QUIRE_ISA {

const Kernels kernels{
    .rms_norm = rms_norm,
    .pack_rows = pack_rows,
    .linear = linear,
    .qkv = qkv,
    .gate_up = gate_up,
    .head = head,
    .embedding = embedding,
    .silu_mul = silu_mul,
    .kv_write = kv_write,
    .paged_attention = paged_attention,
    .merge_attention = merge_attention,
    .tile_rows = [](InputFormat format) -> int64_t { return tile_rows(format); },
};

}  // namespace quire::QUIRE_ISA
