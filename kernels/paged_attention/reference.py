from __future__ import annotations

from functools import reduce
from itertools import pairwise

import torch

from kernels.index_check import check_index, check_range, check_row_ranges
from kernels.layout import PageLayout, read_tokens
from kernels.paged_attention import CHUNK_TOKENS
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
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    check_index("layer", layer, layout.num_layers)
    positions = torch.from_numpy(batch.positions)
    check_range("positions", positions, batch.page_tables.shape[1] * layout.page_size)
    starts = batch.query_starts.tolist()
    check_row_ranges("query_starts", starts, q.shape[0])
    out = torch.empty_like(q)
    for sequence, (start, end) in enumerate(pairwise(starts)):
        for row in range(start, end):
            stop = int(batch.positions[row]) + 1
            first = 0 if window is None else max(0, stop - window)
            table = torch.from_numpy(batch.page_tables[sequence])
            keys, values = _gather(kv, layer, table, first, stop, layout)
            out[row] = _attend(q[row] * scale, keys, values, first)
    return out


def _gather(
    kv: torch.Tensor,
    layer: int,
    page_table: torch.Tensor,
    first: int,
    stop: int,
    layout: PageLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of positions ``first .. stop - 1``, each ``[Hkv, stop - first, D]`` fp32."""
    first_page = first // layout.page_size
    pages = page_table[first_page : -(-stop // layout.page_size)].to(torch.int64)
    check_range("page_tables", pages, kv.shape[0])
    tokens = slice(first - first_page * layout.page_size, stop - first_page * layout.page_size)
    keys, values = read_tokens(kv[pages, layer], layout)  # [P, Hkv, page_size, D]
    return _in_a_row(keys)[:, tokens], _in_a_row(values)[:, tokens]


def _in_a_row(pages: torch.Tensor) -> torch.Tensor:
    """``[P, Hkv, page_size, D]`` as ``[Hkv, P * page_size, D]``."""
    return pages.transpose(0, 1).flatten(1, 2)


def _attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int) -> torch.Tensor:
    """One row: ``q`` [Hq, D] already scaled, keys from position ``first`` on; returns [Hq, D]."""
    num_kv_heads, num_keys, head_dim = keys.shape
    q = q.view(num_kv_heads, -1, head_dim)
    before = first % CHUNK_TOKENS
    ends = [0, *range(CHUNK_TOKENS - before, num_keys, CHUNK_TOKENS), num_keys]
    partials = [
        _attend_chunk(q, keys[:, start:end], values[:, start:end], 0 if start else before)
        for start, end in pairwise(ends)
    ]
    _, total, weighted = reduce(_merge, partials)
    return (weighted / total).view(-1, head_dim)


_Partial = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # m, l [Hkv, G, 1]; o [Hkv, G, D]


def _attend_chunk(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, before: int
) -> _Partial:
    """Always computed over 128 keys, so that its shape never changes.

    The ``before`` first and what is missing at the end are masked.
    """
    end = before + keys.shape[1]
    missing = CHUNK_TOKENS - end
    keys = torch.nn.functional.pad(keys, (0, 0, before, missing))
    values = torch.nn.functional.pad(values, (0, 0, before, missing))
    scores = q @ keys.transpose(1, 2)  # [Hkv, G, 128]
    scores[:, :, :before] = scores[:, :, end:] = -torch.inf
    m = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - m)
    return m, weights.sum(dim=-1, keepdim=True), weights @ values


def _merge(left: _Partial, right: _Partial) -> _Partial:
    m = torch.maximum(left[0], right[0])
    a, b = torch.exp(left[0] - m), torch.exp(right[0] - m)
    return m, left[1] * a + right[1] * b, left[2] * a + right[2] * b
