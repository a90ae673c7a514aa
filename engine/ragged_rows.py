"""Planned rows as a ragged batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.plan import PlannedRows
from kernels.progress import LayerProgress
from kernels.ragged import RaggedBatch


def ragged_batch(
    rows: Sequence[PlannedRows],
    best_only: bool = False,
    progress: LayerProgress | None = None,
    hidden_width: int = 0,
) -> RaggedBatch:
    """The planned rows, in the order of the plan; with room for hidden rows of a width
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
    # One array in four parts: each made by itself takes its time from cold caches.
    numbers = np.array(tokens + positions + wanted + starts, dtype=np.int64)
    first_wanted, first_start = 2 * len(tokens), 2 * len(tokens) + len(wanted)
    return RaggedBatch(
        token_ids=numbers[: len(tokens)],
        positions=numbers[len(tokens) : first_wanted],
        query_starts=numbers[first_start:],
        page_tables=np.array(tables, dtype=np.int32),
        logit_rows=numbers[first_wanted:first_start],
        best_only=best_only,
        progress=progress,
        hidden=np.empty((len(wanted), hidden_width), dtype=np.float32) if hidden_width else None,
    )
