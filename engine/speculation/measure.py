"""What steps take on this machine with this model."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np
import torch

from engine.model import Model
from kernels.layout import PageLayout
from kernels.ragged import RaggedBatch

ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 13, 16, 24, 32, 48, 64)
# A draft or two is worth little more than its row takes: few rows must be known best.
FEW = 6
TRIES = 6
TRY_FOR_S = 0.3
# Rows of one sequence, and its tokens before them.
ATTENTION_ROWS = (1, 2, 4, 8, 16)
CONTEXT = 1024

Key = TypeVar("Key", bound=Hashable)


def measure_steps(model: Model, kv: torch.Tensor, layout: PageLayout) -> dict[int, float]:
    """Seconds of a step by its rows, the best of a few tries: consecutive rows of one sequence
    without any context. Writes into the first pages of ``kv``, which must belong to nobody."""
    slots = int(kv.shape[0]) * layout.page_size
    batches = {rows: _rows_of_one(rows, 0, layout) for rows in ROWS if rows <= slots}
    found = _best(model, kv, layout, batches)
    few = {rows: batch for rows, batch in batches.items() if rows <= FEW}
    again = _best(model, kv, layout, few)
    return {rows: min(took, again.get(rows, took)) for rows, took in found.items()}


def measure_attention(model: Model, kv: torch.Tensor, layout: PageLayout) -> dict[int, float]:
    """Seconds that each token of a sequence's context adds to a step, by the sequence's rows; as
    ``measure_steps``, empty where ``kv`` has no room for a context."""
    slots = int(kv.shape[0]) * layout.page_size
    context = min(CONTEXT, slots // 2, model.spec.max_context - max(ATTENTION_ROWS))
    rows = [each for each in ATTENTION_ROWS if context + each <= slots]
    if context < layout.page_size or not rows:
        return {}
    near = {(each, 0): _rows_of_one(each, 0, layout) for each in rows}
    far = {(each, context): _rows_of_one(each, context, layout) for each in rows}
    found = _best(model, kv, layout, near | far)
    return {each: (found[each, context] - found[each, 0]) / context for each in rows}


def _best(
    model: Model, kv: torch.Tensor, layout: PageLayout, batches: Mapping[Key, RaggedBatch]
) -> dict[Key, float]:
    """Seconds of each. They take turns: what holds the machine up for a while holds up all."""
    for batch in batches.values():
        model.forward(batch, kv, layout)  # makes room for its numbers, brings weights into memory
    times: dict[Key, list[float]] = {key: [] for key in batches}
    ends = time.perf_counter() + TRY_FOR_S
    for _ in range(TRIES):
        for key, batch in batches.items():
            began = time.perf_counter()
            model.forward(batch, kv, layout)
            times[key].append(time.perf_counter() - began)
        if time.perf_counter() >= ends:
            break
    return {key: min(each) for key, each in times.items()}


def _rows_of_one(number: int, context: int, layout: PageLayout) -> RaggedBatch:
    pages = -(-(context + number) // layout.page_size)
    return RaggedBatch(
        token_ids=np.zeros(number, dtype=np.int64),
        positions=np.arange(context, context + number),
        query_starts=np.array([0, number]),
        page_tables=np.arange(pages, dtype=np.int32)[None],
        logit_rows=np.arange(number),
        best_only=True,
    )
