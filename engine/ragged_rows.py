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
    return RaggedBatch(
        token_ids=tokens,
        positions=positions,
        query_starts=starts,
        page_tables=[row.pages for row in rows],
        logit_rows=wanted,
        best_only=best_only,
        progress=progress,
        hidden=np.empty((len(wanted), hidden_width), dtype=np.float32) if hidden_width else None,
    )
