"""Embedding lookup: the rows of a table, as fp32."""

from __future__ import annotations

import torch

from kernels import dispatch
from kernels.packed_matrix import PackedMatrix


def embedding(token_ids: torch.Tensor, table: PackedMatrix) -> torch.Tensor:
    """Rows ``token_ids`` [T] int64 of ``table``, V x H, as [T, H] fp32, turned back if rotated.

    Raises ``ValueError`` if a token id is outside 0..V-1.
    """
    out: torch.Tensor = dispatch.implementation("embedding").embedding(token_ids, table)
    return out
