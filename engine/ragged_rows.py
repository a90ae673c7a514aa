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
    counts = [len(row.tokens) for row in rows]
    starts = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    total = int(starts[-1])
    table = np.full((len(rows), max(len(row.pages) for row in rows)), -1, dtype=np.int32)
    for entries, row in zip(table, rows, strict=True):
        entries[: len(row.pages)] = row.pages
    tokens = np.fromiter((token for row in rows for token in row.tokens), np.int64, total)
    shifts = [row.start - start for row, start in zip(rows, starts[:-1].tolist(), strict=True)]
    positions = np.arange(total) + np.repeat(np.array(shifts, dtype=np.int64), counts)
    logit_rows = [
        at
        for row, end in zip(rows, starts[1:].tolist(), strict=True)
        for at in range(end - row.num_logits, end)
    ]
    return RaggedBatch(
        token_ids=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        query_starts=torch.from_numpy(starts),
        page_tables=torch.from_numpy(table),
        logit_rows=torch.from_numpy(np.array(logit_rows, dtype=np.int64)),
        best_only=best_only,
        progress=progress,
        hidden=torch.empty(len(logit_rows), hidden_width) if hidden_width else None,
    )
