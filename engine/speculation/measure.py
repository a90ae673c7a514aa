"""What steps take on this machine with this model."""

from __future__ import annotations

import time

import numpy as np
import torch

from engine.model import Model
from kernels.layout import PageLayout
from kernels.ragged import RaggedBatch

ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 13, 16, 24, 32, 48, 64)
TRIES = 6
TRY_FOR_S = 0.3


def measure_steps(model: Model, kv: torch.Tensor, layout: PageLayout) -> dict[int, float]:
    """Seconds of a step by its rows, the best of a few tries: consecutive rows of one sequence, as
    verification has them. Writes into the first pages of ``kv``, which must belong to nobody.

    Numbers of rows take turns: what holds the machine up for a while holds up all of them.
    """
    num_pages = int(kv.shape[0])
    batches = {
        number: _rows_of_one(number, layout)
        for number in ROWS
        if number <= num_pages * layout.page_size
    }
    for batch in batches.values():
        model.forward(batch, kv, layout)  # makes room for its numbers, brings weights into memory
    times: dict[int, list[float]] = {number: [] for number in batches}
    ends = time.perf_counter() + TRY_FOR_S
    for _ in range(TRIES):
        for number, batch in batches.items():
            began = time.perf_counter()
            model.forward(batch, kv, layout)
            times[number].append(time.perf_counter() - began)
        if time.perf_counter() >= ends:
            break
    return {number: min(each) for number, each in times.items()}


def _rows_of_one(number: int, layout: PageLayout) -> RaggedBatch:
    pages = -(-number // layout.page_size)
    positions = np.arange(number)
    return RaggedBatch(
        token_ids=np.zeros(number, dtype=np.int64),
        positions=positions,
        query_starts=np.array([0, number]),
        page_tables=np.arange(pages, dtype=np.int32)[None],
        logit_rows=positions,
        best_only=True,
    )
