from __future__ import annotations

import torch

from kernels.index_check import check_index, check_range
from kernels.layout import LANES, SCALED, PageLayout, scale_views, token_blocks


def kv_write(
    k: torch.Tensor,
    v: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    pages: torch.Tensor,
    offsets: torch.Tensor,
    layout: PageLayout,
) -> None:
    check_index("layer", layer, layout.num_layers)
    check_range("pages", pages, kv.shape[0])
    check_range("offsets", offsets, layout.page_size)
    heads = kv[:, layer]
    if layout.kv_dtype == SCALED:
        key_scales, value_scales = scale_views(heads, layout)
        k, key_scales[pages, :, offsets] = quantized(k)
        v, value_scales[pages, :, offsets] = quantized(v)
    for rows, blocks in zip((k, v), token_blocks(heads, layout), strict=True):
        blocks[pages, :, offsets // LANES, offsets % LANES] = rows.to(layout.dtype)


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers ``[..., head_dim]``, still fp32, and one scale ``[...]`` for each token and head."""
    finite = x.isfinite().all(-1)
    scales = torch.where(finite, x.abs().amax(-1) / 127, torch.nan)
    integers = (x / scales[..., None]).round().clamp(-127, 127)
    return torch.where(scales[..., None] > 0, integers, 0), scales
