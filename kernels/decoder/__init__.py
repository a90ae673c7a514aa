"""A whole Llama-family decoder: every op of a step, from token ids to logits.

Pre-norm layers with grouped-query attention, rotary positions and a SwiGLU feed-forward (Touvron et
al., 2023, arXiv:2302.13971); the reference composes the ops, the native kernel runs them as one
program of fused phases with the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kernels import dispatch
from kernels.layout import PageLayout
from kernels.packed_matrix import TILE_OUTPUTS, PackedMatrix, round_up
from kernels.ragged import RaggedBatch, Said

FEED_FORWARD_BLOCK = 128
Float32 = NDArray[np.float32]


def qkv_rows(num_heads: int, head_dim: int) -> torch.Tensor:
    """For every row of ``DecoderLayer.qkv``, its row among ``num_heads`` heads, -1 for padding."""
    rows = torch.arange(num_heads * head_dim).view(num_heads, head_dim)
    return F.pad(rows, (0, round_up(head_dim, TILE_OUTPUTS) - head_dim), value=-1).flatten()


def gate_up_rows(width: int) -> torch.Tensor:
    """For every row of ``DecoderLayer.gate_up``, its row of gate above up, -1 for padding."""
    missing = round_up(width, FEED_FORWARD_BLOCK) - width
    gate = F.pad(torch.arange(width), (0, missing), value=-1).view(-1, FEED_FORWARD_BLOCK)
    return torch.stack((gate, torch.where(gate < 0, -1, gate + width)), dim=1).flatten()


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Norms and biases are fp32 vectors, None where the model has none.

    ``qkv`` has the query, key and value heads below each other, each padded with zero rows to
    ``padded_head_dim``; its bias is not padded. ``gate_up`` has, for every block of 128 of the
    feed-forward's width (padded with zero rows to whole blocks), gate's rows, then up's, and so has
    its bias. ``qkv_rows`` and ``gate_up_rows`` give these orders.
    """

    attention_norm: torch.Tensor  # [H]
    qkv: PackedMatrix  # [(Hq + 2 Hkv) * padded head_dim, H]
    out: PackedMatrix  # [H, Hq * head_dim]
    mlp_norm: torch.Tensor  # [H]
    gate_up: PackedMatrix  # [2 * padded F, H]
    down: PackedMatrix  # [H, F]
    qkv_bias: torch.Tensor | None = None  # [(Hq + 2 Hkv) * head_dim]
    out_bias: torch.Tensor | None = None  # [H]
    gate_up_bias: torch.Tensor | None = None  # [2 * padded F]
    down_bias: torch.Tensor | None = None  # [H]
    q_norm: torch.Tensor | None = None  # [head_dim]
    k_norm: torch.Tensor | None = None  # [head_dim]
    window: int | None = None  # as paged_attention takes it


@dataclass(frozen=True, slots=True)
class StateInputs:
    """Of a decoder that goes on from another's hidden rows, in that one's pages.

    A row begins as ``from_state norm(hidden row of the token before it) + from_token
    norm(embedding)``, as in EAGLE (Li et al., 2024, arXiv:2401.15077); its layers are the pages'
    from ``first_layer`` on. ``ids`` are the tokens that its head's outputs stand for.
    """

    state_norm: torch.Tensor  # [H]
    token_norm: torch.Tensor  # [H]
    from_state: PackedMatrix  # [H, H]
    from_token: PackedMatrix  # [H, H]
    ids: torch.Tensor  # [V] int64
    first_layer: int


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """One model's weights in the form its steps read."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    attention_scale: float
    embedding: PackedMatrix  # [V, H]
    layers: tuple[DecoderLayer, ...]
    norm: torch.Tensor  # [H]
    head: PackedMatrix  # [V, H], the embedding itself if tied
    cos: torch.Tensor  # [max positions, head_dim / 2], of kernels.rope.rope_tables
    sin: torch.Tensor
    states: StateInputs | None = None

    @property
    def width(self) -> int:
        return self.embedding.inputs

    @property
    def padded_head_dim(self) -> int:
        return round_up(self.head_dim, TILE_OUTPUTS)


@dataclass(frozen=True, slots=True)
class DraftRows:
    """The last token of each of ``B`` sequences, its predecessor's state, where it stands, and the
    sequence's page slots from position 0 on. No arrays but the states, as a ragged batch's."""

    tokens: Sequence[int]  # [B]
    states: Sequence[Float32]  # B of [H]
    positions: Sequence[int]  # [B]
    tables: Sequence[Sequence[int]]  # B of any number

    def first(self, number: int) -> DraftRows:
        """The first so many of them."""
        return DraftRows(
            self.tokens[:number],
            self.states[:number],
            self.positions[:number],
            self.tables[:number],
        )

    def after(self, tokens: Sequence[int], states: Sequence[Float32]) -> DraftRows:
        """Those one position further on."""
        return DraftRows(tokens, states, [each + 1 for each in self.positions], self.tables)

    def batch(self, best_only: bool, hidden: Float32) -> RaggedBatch:
        """As rows of a step whose new states are written to ``hidden [B, H]``."""
        each = range(len(self.tokens))
        return RaggedBatch(
            token_ids=self.tokens,
            positions=self.positions,
            query_starts=[*each, len(each)],
            page_tables=self.tables,
            logit_rows=each,
            best_only=best_only,
            hidden=hidden,
            states=np.stack(self.states),
        )


class Decoder(Protocol):
    def forward(self, batch: RaggedBatch, kv: torch.Tensor, layout: PageLayout) -> Said:
        """Writes K and V of every row into its page; logits ``[R, V]`` fp32 of ``logit_rows``.

        Tells the batch's ``progress`` as keys and values of its layers are written, whoever runs.

        Writes the batch's ``hidden`` if it has one.

        If the batch says ``best_only``, ``kernels.ragged.best_ids`` of them instead.

        ``kv`` is ``kernels.layout.kv_view`` of the pool. The batch has ``states`` exactly if the
        weights have. Raises ``ValueError`` naming what is out
        of range, before anything is written.
        """
        ...

    def draft(
        self, rows: DraftRows, lengths: Sequence[int], kv: torch.Tensor, layout: PageLayout
    ) -> list[list[int]]:
        """Of weights with ``states``: the tokens they say after each row, ``lengths [B]`` of them,
        each going on from the one before; -1 where a logit was not finite. ``lengths`` do not
        ascend. Raises as ``forward``."""
        ...


def decoder(weights: DecoderWeights) -> Decoder:
    """The decoder of this process's back end."""
    made: Decoder = dispatch.implementation("decoder").decoder(weights)
    return made
