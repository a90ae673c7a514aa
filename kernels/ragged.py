"""The ragged batch: one step's rows, whatever they are (prefill chunks, decode, verification)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.progress import LayerProgress


class _Array:
    """A field given as an array or as sequences of numbers, seen as an array: it is made when it is
    first looked at."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._dtype = dtype

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, batch: object, owner: type) -> NDArray[Any]:
        if batch is None:
            raise AttributeError(self._name)  # no default
        given = vars(batch)[self._name]
        array = given if isinstance(given, np.ndarray) else np.array(_even(given), self._dtype)
        vars(batch)[self._name] = array
        return array

    def __set__(self, batch: object, value: Any) -> None:
        vars(batch)[self._name] = value


def _even(numbers: Sequence[Any]) -> Sequence[Any]:
    """Sequences of different lengths with -1 behind the shorter ones; numbers as they are."""
    if not len(numbers) or not isinstance(numbers[0], Sequence):
        return numbers
    most = max(map(len, numbers))
    return [(*each, *(-1,) * (most - len(each))) for each in numbers]


@dataclass(frozen=True)
class RaggedBatch:
    """``S`` sequences contribute ``T`` query rows, concatenated in sequence order.

    The rows of sequence ``s`` are ``query_starts[s]:query_starts[s + 1]`` and stand at consecutive
    positions; row ``t`` attends to positions ``0 .. positions[t]`` of its own sequence, its own key
    included. ``page_tables[s]`` lists the page slots of sequence ``s`` from position 0; entries
    past the last needed page are -1. With ``best_only`` nobody wants the logits, only the id of
    each row's largest one. ``hidden`` is filled with what the last layer made of these rows.
    ``progress`` is told as the layers' keys and values are written. ``states`` are the hidden rows
    that a decoder with ``StateInputs`` goes on from: of each row's predecessor.

    The numbers may be given as arrays or as sequences, page tables of different lengths too; they
    are arrays to whoever looks at them. The native decoder takes them as ``given``: a step makes
    these few numbers anew, and what even a small array takes is in no cache after its weights.
    """

    token_ids: _Array = _Array(np.int64)  # [T]
    positions: _Array = _Array(np.int64)  # [T]
    query_starts: _Array = _Array(np.int64)  # [S + 1], from 0 to T
    page_tables: _Array = _Array(np.int32)  # [S, max_pages]
    logit_rows: _Array = _Array(np.int64)  # [R], ascending rows whose logits are wanted
    best_only: bool = False
    progress: LayerProgress | None = None
    hidden: NDArray[np.float32] | None = None  # [R, H], before the last norm
    states: NDArray[np.float32] | None = None  # [T, H]

    @property
    def num_rows(self) -> int:
        return len(self.given["token_ids"])

    @property
    def num_sequences(self) -> int:
        return len(self.given["page_tables"])

    @property
    def num_logits(self) -> int:
        return len(self.given["logit_rows"])

    @property
    def given(self) -> Mapping[str, Any]:
        """The fields as they were given, those that were looked at as arrays."""
        return vars(self)


def row_slots(batch: RaggedBatch, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row's key and value go: (page slot, offset in page), both ``[T]`` int64."""
    owner = np.repeat(np.arange(batch.num_sequences), np.diff(batch.query_starts))
    pages = batch.page_tables[owner, batch.positions // page_size].astype(np.int64)
    return torch.from_numpy(pages), torch.from_numpy(batch.positions % page_size)


Said = torch.Tensor | list[int]
"""What a step says of a batch's ``logit_rows``: logits ``[R, V]`` fp32, or their ``best_ids``."""


def best_ids(logits: torch.Tensor) -> list[int]:
    """The id of each row's largest logit, the lowest of equal ones; -1 if one is not finite.

    ``logits`` [R, V] fp32; returns R of them.
    """
    ids = torch.where(logits == logits.amax(dim=1, keepdim=True), 1, 0).argmax(dim=1)
    found: list[int] = torch.where(logits.isfinite().all(dim=1), ids, -1).tolist()
    return found
