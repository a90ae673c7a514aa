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
    starts = np.cumsum([0] + [len(row.tokens) for row in rows])
    table = np.full((len(rows), max(len(row.pages) for row in rows)), -1, dtype=np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row.pages)] = row.pages
    positions = [np.arange(row.start, row.start + len(row.tokens)) for row in rows]
    logit_rows = [
        at
        for row, end in zip(rows, starts[1:], strict=True)
        for at in range(end - row.num_logits, end)
    ]
    return RaggedBatch(
        token_ids=torch.tensor([token for row in rows for token in row.tokens], dtype=torch.int64),
        positions=torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        query_starts=torch.from_numpy(starts.astype(np.int64)),
        page_tables=torch.from_numpy(table),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        best_only=best_only,
        progress=progress,
        hidden=torch.empty(len(logit_rows), hidden_width) if hidden_width else None,
    )
