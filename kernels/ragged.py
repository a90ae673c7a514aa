"""The ragged batch: one step's rows, whatever they are (prefill chunks, decode, verification)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.progress import LayerProgress


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """``S`` sequences contribute ``T`` query rows, concatenated in sequence order.

    The rows of sequence ``s`` are ``query_starts[s]:query_starts[s + 1]`` and stand at consecutive
    positions; row ``t`` attends to positions ``0 .. positions[t]`` of its own sequence, its own key
    included. ``page_tables[s]`` lists the page slots of sequence ``s`` from position 0; entries
    past the last needed page are -1. With ``best_only`` nobody wants the logits, only the id of
    each row's largest one. ``hidden`` is filled with what the last layer made of these rows.
    ``progress`` is told as the layers' keys and values are written. ``states`` are the hidden rows
    that a decoder with ``StateInputs`` goes on from: of each row's predecessor.

    In numpy: a step makes these few numbers anew, from caches that its weights have emptied, where
    torch's way to a small tensor and back takes longer.
    """

    token_ids: NDArray[np.int64]  # [T]
    positions: NDArray[np.int64]  # [T]
    query_starts: NDArray[np.int64]  # [S + 1], from 0 to T
    page_tables: NDArray[np.int32]  # [S, max_pages]
    logit_rows: NDArray[np.int64]  # [R], ascending rows whose logits are wanted (may be empty)
    best_only: bool = False
    progress: LayerProgress | None = None
    hidden: NDArray[np.float32] | None = None  # [R, H], before the last norm
    states: NDArray[np.float32] | None = None  # [T, H]

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.page_tables)


def row_slots(batch: RaggedBatch, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row's key and value go: (page slot, offset in page), both ``[T]`` int64."""
    owner = np.repeat(np.arange(batch.num_sequences), np.diff(batch.query_starts))
    pages = batch.page_tables[owner, batch.positions // page_size].astype(np.int64)
    return torch.from_numpy(pages), torch.from_numpy(batch.positions % page_size)


def best_ids(logits: torch.Tensor) -> torch.Tensor:
    """The id of each row's largest logit, the lowest of equal ones; -1 if one is not finite.

    ``logits`` [R, V] fp32; returns [R] int32.
    """
    ids = torch.where(logits == logits.amax(dim=1, keepdim=True), 1, 0).argmax(dim=1)
    return torch.where(logits.isfinite().all(dim=1), ids, -1).to(torch.int32)
