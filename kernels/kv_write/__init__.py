"""Stores the keys and values of a step's rows in their pages."""

from __future__ import annotations

import torch

from kernels import dispatch
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
    """Rounds row t of ``k`` and ``v`` to the KV dtype, stores it at ``pages[t]``, ``offsets[t]``.

    ``k`` and ``v`` [T, Hkv, D] fp32; ``kv`` is ``kernels.layout.kv_view`` of the pool, written in
    place; ``pages`` and ``offsets`` [T] int64, as ``kernels.ragged.row_slots`` gives them, no slot
    twice. Rounding is to nearest, ties to even; under int8 of ``x / scale``, both divisions rounded
    to fp32, within -127 .. 127. Raises ``ValueError`` naming the argument if an index is out of
    range, before anything is written.
    """
    dispatch.implementation("kv_write").kv_write(k, v, kv, layer, pages, offsets, layout)
