#include "kernels.h"

namespace quire::QUIRE_ISA {

const Kernels kernels{
    .rms_norm = rms_norm,
    .linear_f32 = linear_f32,
    .linear_bf16 = linear_bf16,
    .silu_mul = silu_mul,
    .kv_write_f32 = kv_write_f32,
    .kv_write_bf16 = kv_write_bf16,
    .paged_attention_f32 = paged_attention_f32,
    .paged_attention_bf16 = paged_attention_bf16,
};

}  // namespace quire::QUIRE_ISA
