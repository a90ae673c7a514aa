"""Planned rows as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.plan import PlannedRows
from kernels.progress import LayerProgress
from kernels.ragged import RaggedBatch


def ragged_batch(
    rows: Sequence[PlannedRows],
    best_only: bool = False,
    progress: LayerProgress | None = None,
    hidden_width: int = 0,
) -> RaggedBatch:
    """The planned rows as tensors, in the order of the plan; with room for hidden rows of a width
    that is not 0."""
    tokens: list[int] = []
    positions: list[int] = []
    starts = [0]
    wanted: list[int] = []
    for row in rows:
        tokens += row.tokens
        positions += range(row.start, row.start + len(row.tokens))
        starts.append(len(tokens))
        wanted += range(len(tokens) - row.num_logits, len(tokens))
    most_pages = max(len(row.pages) for row in rows)
    tables = [(*row.pages, *(-1,) * (most_pages - len(row.pages))) for row in rows]
    return RaggedBatch(
        token_ids=_numbers(tokens),
        positions=_numbers(positions),
        query_starts=_numbers(starts),
        page_tables=torch.from_numpy(np.array(tables, dtype=np.int32)),
        logit_rows=_numbers(wanted),
        best_only=best_only,
        progress=progress,
        hidden=torch.empty(len(wanted), hidden_width) if hidden_width else None,
    )


def _numbers(values: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int64))
