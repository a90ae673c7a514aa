"""A model that remembers when each of its forward passes began and ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from engine.model import Model, ModelSpec
from kernels.layout import PageLayout
from kernels.ragged import RaggedBatch, Said


@dataclass(frozen=True, slots=True)
class Call:
    """One forward pass; times are those of ``time.perf_counter``."""

    began: float
    ended: float
    batch: RaggedBatch

    @property
    def num_keys(self) -> int:
        """Keys attended to, over all rows."""
        return int(self.batch.positions.sum()) + self.batch.num_rows

    def decodes(self, num_sequences: int) -> bool:
        """Whether it was one row with logits for each of so many sequences, and nothing else."""
        return self.batch.num_rows == len(self.batch.logit_rows) == num_sequences


class TimedModel:
    """Behaves as ``model`` does in everything else."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.calls: list[Call] = []

    @property
    def spec(self) -> ModelSpec:
        return self._model.spec

    def forward(self, batch: RaggedBatch, kv: torch.Tensor, layout: PageLayout) -> Said:
        began = time.perf_counter()
        logits = self._model.forward(batch, kv, layout)
        self.calls.append(Call(began, time.perf_counter(), batch))
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def longest_decode(calls: Sequence[Call], num_sequences: int) -> list[Call]:
    """The longest run of passes in which so many sequences decoded together; may be empty."""
    groups = groupby(calls, key=lambda call: call.decodes(num_sequences))
    return max((list(run) for decodes, run in groups if decodes), key=len, default=[])
