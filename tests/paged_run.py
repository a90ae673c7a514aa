"""Runs a model the way the engine does, without the engine: ragged batches over scattered pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.model import Model
from kernels.layout import kv_view
from kernels.ragged import RaggedBatch

GARBAGE = 0xFF  # bytes of an unwritten page: NaN in every KV dtype


@dataclass(frozen=True, slots=True)
class Rows:
    """``token_ids`` of one sequence from position ``start`` on; its pages from position 0."""

    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]


def ragged(rows: Sequence[Rows], logit_rows: Sequence[int]) -> RaggedBatch:
    counts = [0, *(len(each.token_ids) for each in rows)]
    tables = np.full((len(rows), max(len(each.pages) for each in rows)), -1, dtype=np.int32)
    for table, each in zip(tables, rows, strict=True):
        table[: len(each.pages)] = each.pages
    positions = [np.arange(each.start, each.start + len(each.token_ids)) for each in rows]
    return RaggedBatch(
        token_ids=np.array([token for each in rows for token in each.token_ids]),
        positions=np.concatenate(positions),
        query_starts=np.cumsum(counts),
        page_tables=tables,
        logit_rows=np.array(logit_rows, dtype=np.int64),
    )


class PagedRun:
    """Sequences of up to ``max_tokens`` tokens over one pool, their pages dealt out at random."""

    def __init__(
        self, model: Model, num_sequences: int, max_tokens: int, page_size: int = 16
    ) -> None:
        self.model = model
        self.layout = model.spec.page_layout(page_size)
        per_sequence = -(-max_tokens // page_size)
        size = (per_sequence * num_sequences, self.layout.page_bytes)
        self.memory = torch.full(size, GARBAGE, dtype=torch.uint8)
        order = torch.randperm(size[0], generator=torch.Generator().manual_seed(5)).tolist()
        self.pages = [order[index::num_sequences] for index in range(num_sequences)]
        self.lengths = [0] * num_sequences

    def step(self, tokens: dict[int, Sequence[int]], logit_rows: Sequence[int]) -> torch.Tensor:
        """Appends ``tokens`` to their sequences; logits of the rows wanted."""
        rows = []
        for sequence, ids in tokens.items():
            rows.append(Rows(ids, self.lengths[sequence], self.pages[sequence]))
            self.lengths[sequence] += len(ids)
        return self.forward(rows, logit_rows)

    def forward(self, rows: Sequence[Rows], logit_rows: Sequence[int]) -> torch.Tensor:
        batch = ragged(rows, logit_rows)
        return self.model.forward(batch, kv_view(self.memory, self.layout), self.layout)


def all_logits(
    model: Model, sequences: Sequence[Sequence[int]], chunks: Sequence[int], page_size: int = 16
) -> list[torch.Tensor]:
    """Logits ``[len(sequence), vocab_size]`` of each sequence, run together.

    Sequence s goes in chunks of ``chunks[s % len(chunks)]`` tokens.
    """
    run = PagedRun(model, len(sequences), max(map(len, sequences)), page_size)
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    while True:
        tokens: dict[int, Sequence[int]] = {}
        for index, sequence in enumerate(sequences):
            start = run.lengths[index]
            chunk = sequence[start : start + chunks[index % len(chunks)]]
            if chunk:
                tokens[index] = chunk
        if not tokens:
            return [torch.cat(parts) for parts in found]
        counts = [len(ids) for ids in tokens.values()]
        logits = run.step(tokens, range(sum(counts)))
        for index, part in zip(tokens, logits.split(counts), strict=True):
            found[index].append(part)
