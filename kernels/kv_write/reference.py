from __future__ import annotations

import torch

from kernels.index_check import check_index, check_range
from kernels.layout import LANES, PageLayout, key_view, value_view


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
    keys, values = key_view(kv, layer, layout), value_view(kv, layer, layout)
    keys[pages, :, offsets // LANES, :, offsets % LANES] = k.to(layout.dtype)
    values[pages, :, offsets] = v.to(layout.dtype)
