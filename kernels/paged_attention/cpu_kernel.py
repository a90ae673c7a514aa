from __future__ import annotations

import torch

from kernels import _native
from kernels.layout import PageLayout
from kernels.ragged import RaggedBatch


def paged_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    batch: RaggedBatch,
    layout: PageLayout,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    layout.check_lanes()
    out = torch.empty_like(q)
    _native.paged_attention(
        q,
        kv,
        layer,
        batch.positions,
        batch.query_starts,
        batch.page_tables,
        layout.kv_dtype,
        layout.page_size,
        scale,
        window,
        out,
    )
    return out
