"""What the engine needs of a model, whatever runs inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.layout import PageLayout
from kernels.ragged import RaggedBatch, Said


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Facts about a loaded model; two workers may share pages only if all of these agree.

    ``digest`` is 32 hex digits over architecture, hyperparameters and weights as stored.
    ``numerics`` names the numerics version: weight mode, KV dtype, kernel back ends and their
    instruction-set class; equal names promise equal bits. ``weight_bytes`` is what one decode step
    must read.
    """

    name: str
    digest: str
    numerics: str
    vocab_size: int
    max_context: int
    eos_token_ids: frozenset[int]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    weight_mode: str
    kv_dtype: str
    weight_bytes: int

    def page_layout(self, page_size: int) -> PageLayout:
        return PageLayout(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            page_size=page_size,
            kv_dtype=self.kv_dtype,
        )


class Model(Protocol):
    """Runs a ragged batch against pages. Called from one thread only."""

    @property
    def spec(self) -> ModelSpec: ...

    def forward(self, batch: RaggedBatch, kv: torch.Tensor, layout: PageLayout) -> Said:
        """Writes K and V of every row into its page, returns logits of ``batch.logit_rows``.

        ``kv`` is ``kernels.layout.kv_view`` of the pool. Returns ``[R, vocab_size]`` fp32, or
        ``kernels.ragged.best_ids`` of that if the batch says ``best_only``.
        """
        ...
