from __future__ import annotations

from functools import reduce
from itertools import pairwise

import torch

from kernels.index_check import check_index, check_range, check_row_ranges
from kernels.layout import PageLayout, key_view, value_view
from kernels.paged_attention import CHUNK_TOKENS
from kernels.ragged import RaggedBatch


def paged_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    batch: RaggedBatch,
    layout: PageLayout,
    scale: float,
) -> torch.Tensor:
    check_index("layer", layer, layout.num_layers)
    check_range("positions", batch.positions, batch.page_tables.shape[1] * layout.page_size)
    starts = batch.query_starts.tolist()
    check_row_ranges("query_starts", starts, q.shape[0])
    out = torch.empty_like(q)
    for sequence, (start, end) in enumerate(pairwise(starts)):
        for row in range(start, end):
            num_keys = int(batch.positions[row]) + 1
            pages = batch.page_tables[sequence, : -(-num_keys // layout.page_size)].to(torch.int64)
            check_range("page_tables", pages, kv.shape[0])
            keys, values = _gather(kv, layer, pages, num_keys, layout)
            out[row] = _attend(q[row] * scale, keys, values)
    return out


def _gather(
    kv: torch.Tensor, layer: int, pages: torch.Tensor, num_keys: int, layout: PageLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of positions 0 .. num_keys - 1, each ``[Hkv, num_keys, D]`` fp32."""
    keys = key_view(kv, layer, layout)[pages]  # [P, Hkv, page_size / 16, D, 16]
    values = value_view(kv, layer, layout)[pages]  # [P, Hkv, page_size, D]
    keys = keys.permute(1, 0, 2, 4, 3).flatten(1, 3)[:, :num_keys]
    values = values.permute(1, 0, 2, 3).flatten(1, 2)[:, :num_keys]
    return keys.to(torch.float32), values.to(torch.float32)


def _attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One row: ``q`` [Hq, D] already scaled; returns [Hq, D]."""
    num_kv_heads, num_keys, head_dim = keys.shape
    q = q.view(num_kv_heads, -1, head_dim)
    chunks = [slice(start, start + CHUNK_TOKENS) for start in range(0, num_keys, CHUNK_TOKENS)]
    partials = [_attend_chunk(q, keys[:, chunk], values[:, chunk]) for chunk in chunks]
    _, total, weighted = reduce(_merge, partials)
    return (weighted / total).view(-1, head_dim)


_Partial = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # m, l [Hkv, G, 1]; o [Hkv, G, D]


def _attend_chunk(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> _Partial:
    """Always computed over 128 keys, the missing ones masked, so that its shape never changes."""
    num_keys = keys.shape[1]
    missing = CHUNK_TOKENS - num_keys
    keys = torch.nn.functional.pad(keys, (0, 0, 0, missing))
    values = torch.nn.functional.pad(values, (0, 0, 0, missing))
    scores = q @ keys.transpose(1, 2)  # [Hkv, G, 128]
    scores[:, :, num_keys:] = -torch.inf
    m = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - m)
    return m, weights.sum(dim=-1, keepdim=True), weights @ values


def _merge(left: _Partial, right: _Partial) -> _Partial:
    m = torch.maximum(left[0], right[0])
    a, b = torch.exp(left[0] - m), torch.exp(right[0] - m)
    return m, left[1] * a + right[1] * b, left[2] * a + right[2] * b
