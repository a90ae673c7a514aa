"""Embedding lookup: the rows of a table, as fp32."""

from __future__ import annotations

import torch

from kernels import dispatch


def embedding(token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows ``token_ids`` [T] int64 of ``table`` [V, H] fp32 or bf16, as [T, H] fp32 (exact).

    Raises ``ValueError`` if a token id is outside 0..V-1.
    """
    out: torch.Tensor = dispatch.implementation("embedding").embedding(token_ids, table)
    return out
