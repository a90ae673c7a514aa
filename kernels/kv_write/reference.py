from __future__ import annotations

import torch

from kernels.index_check import check_index, check_range
from kernels.layout import LANES, SCALED, PageLayout, key_view, scale_views, value_view


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
        k, key_scales[pages, :, offsets] = _quantized(k)
        v, value_scales[pages, :, offsets] = _quantized(v)
    key_view(heads, layout)[pages, :, offsets // LANES, :, offsets % LANES] = k.to(layout.dtype)
    value_view(heads, layout)[pages, :, offsets] = v.to(layout.dtype)


def _quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers ``[T, Hkv, D]``, still fp32, and scales ``[T, Hkv]``."""
    finite = x.isfinite().all(-1)
    scales = torch.where(finite, x.abs().amax(-1) / 127, torch.nan)
    integers = (x / scales[..., None]).round().clamp(-127, 127)
    return torch.where(scales[..., None] > 0, integers, 0), scales
