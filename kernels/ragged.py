"""The ragged batch: one step's rows, whatever they are (prefill chunks, decode, verification)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
    """

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    query_starts: torch.Tensor  # [S + 1] int64, from 0 to T
    page_tables: torch.Tensor  # [S, max_pages] int32
    logit_rows: torch.Tensor  # [R] int64, ascending rows whose logits are wanted (may be empty)
    best_only: bool = False
    progress: LayerProgress | None = None
    hidden: torch.Tensor | None = None  # [R, H] fp32, before the last norm
    states: torch.Tensor | None = None  # [T, H] fp32

    @property
    def num_rows(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def num_sequences(self) -> int:
        return int(self.page_tables.shape[0])


def row_slots(batch: RaggedBatch, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row's key and value go: (page slot, offset in page), both ``[T]`` int64."""
    counts = batch.query_starts[1:] - batch.query_starts[:-1]
    owner = torch.repeat_interleave(torch.arange(batch.num_sequences), counts)
    pages = batch.page_tables[owner, batch.positions // page_size].to(torch.int64)
    return pages, batch.positions % page_size


def best_ids(logits: torch.Tensor) -> torch.Tensor:
    """The id of each row's largest logit, the lowest of equal ones; -1 if one is not finite.

    ``logits`` [R, V] fp32; returns [R] int32.
    """
    ids = torch.where(logits == logits.amax(dim=1, keepdim=True), 1, 0).argmax(dim=1)
    return torch.where(logits.isfinite().all(dim=1), ids, -1).to(torch.int32)
