from __future__ import annotations

import torch

from kernels import _native
from kernels.layout import PageLayout


def kv_write(
    k: torch.Tensor,
    v: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    pages: torch.Tensor,
    offsets: torch.Tensor,
    layout: PageLayout,
) -> None:
    layout.check_lanes()
    _native.kv_write(k, v, kv, layer, pages, offsets, layout.kv_dtype, layout.page_size)
