"""Attention of a ragged batch over the pages of its sequences."""

from __future__ import annotations

import torch

from kernels import dispatch
from kernels.layout import PageLayout
from kernels.ragged import RaggedBatch

CHUNK_TOKENS = 128


def paged_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    batch: RaggedBatch,
    layout: PageLayout,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Softmax attention of each row to positions ``0 .. positions[t]`` of its own sequence.

    With a ``window``, at least 1, a row at position p sees ``max(0, p - window + 1) .. p`` only
    (sliding window; Jiang et al., 2023, arXiv:2310.06825).

    ``q`` [T, Hq, D] fp32; ``kv`` is ``kernels.layout.kv_view`` of the pool, in which the rows' own
    keys and values already stand; query head h reads KV head ``h // (Hq / Hkv)``; D is a multiple
    of 16, at most 256. Returns a new [T, Hq, D] fp32. What a row does not see has no part in it:
    pages may hold anything there, and page slots of which nothing is seen may be anything. Raises
    ``ValueError`` naming the argument if a page slot, position, row range or window is out of
    range.

    A row's bits depend on its q, its keys and values, and its position, on nothing else. Keys are
    taken in chunks of 128 by absolute position from 0. A chunk of which the row sees anything
    gives, per head, the maximum m of its scores, l = sum of exp(score - m) and o = sum of
    exp(score - m) * value. Chunks are merged in ascending order by rescaling to the larger m
    (Milakov and Gimelshein, 2018, arXiv:1805.02867); the result is o / l.

    Order of the native kernel: scores are ``sum_d (q_d * scale) * k_d``, d ascending, lanes are the
    16 tokens of a sub-block; l is summed per lane over the sub-blocks, ascending, then over lanes
    as j + (j+8), +4, +2, +1; o is summed over tokens, ascending, lanes are 16 of head_dim.
    Products enter sums by fused multiply-add. Under int8, k_d and values are the integers: the sum
    over d is multiplied by the key's scale; a weight, after it was added to l, by the value's.
    """
    attend = dispatch.implementation("paged_attention").paged_attention
    out: torch.Tensor = attend(q, kv, layer, batch, layout, scale, window)
    return out
