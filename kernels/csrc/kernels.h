// The unit functions of one instruction set: what each source file defines, listed by kernels.cpp.
#pragma once

#include "lanes.h"

namespace quire::QUIRE_ISA {

void rms_norm(const RmsNorm& a, int64_t row);
void linear_f32(const Linear& a, int64_t unit);
void linear_bf16(const Linear& a, int64_t unit);
void silu_mul(const SiluMul& a, int64_t unit);
void kv_write_f32(const KvWrite& a, int64_t row);
void kv_write_bf16(const KvWrite& a, int64_t row);
void paged_attention_f32(const PagedAttention& a, int64_t unit);
void paged_attention_bf16(const PagedAttention& a, int64_t unit);

}  // namespace quire::QUIRE_ISA
