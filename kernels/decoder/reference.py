from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kernels.decoder import (
    FEED_FORWARD_BLOCK,
    Decoder,
    DecoderLayer,
    DecoderWeights,
    DraftRows,
)
from kernels.embedding.reference import embedding
from kernels.kv_write.reference import kv_write
from kernels.layout import PageLayout
from kernels.linear.reference import linear
from kernels.paged_attention.reference import paged_attention
from kernels.ragged import RaggedBatch, Said, best_ids, row_slots
from kernels.rms_norm.reference import rms_norm
from kernels.rope.reference import rope
from kernels.silu_mul.reference import silu_mul


def decoder(weights: DecoderWeights) -> Decoder:
    return ReferenceDecoder(weights)


class ReferenceDecoder:
    def __init__(self, weights: DecoderWeights) -> None:
        self._weights = weights

    def forward(self, batch: RaggedBatch, kv: torch.Tensor, layout: PageLayout) -> Said:
        weights, step = self._weights, _Step(batch, kv, layout)
        hidden = self._first(batch)  # [T, H]
        first_layer = 0 if weights.states is None else weights.states.first_layer
        for index, layer in enumerate(weights.layers, first_layer):
            hidden = hidden + self._attention(index, layer, hidden, step)
            hidden = hidden + self._mlp(layer, hidden)
        rows = hidden[torch.from_numpy(batch.logit_rows)]
        if batch.hidden is not None:
            batch.hidden[:] = rows.numpy()
        rows = rms_norm(rows, weights.norm, weights.norm_eps)
        logits = linear(rows, weights.head)
        return best_ids(logits) if batch.best_only else logits

    def draft(
        self, rows: DraftRows, lengths: Sequence[int], kv: torch.Tensor, layout: PageLayout
    ) -> list[list[int]]:
        assert self._weights.states is not None
        return draft_by_steps(self, rows, lengths, self._weights.states.ids, kv, layout)

    def _first(self, batch: RaggedBatch) -> torch.Tensor:
        rows = embedding(torch.from_numpy(batch.token_ids), self._weights.embedding)
        states, eps = self._weights.states, self._weights.norm_eps
        if (states is None) != (batch.states is None):
            raise ValueError("states must be given if the weights go on from some")
        if states is None or batch.states is None:
            return rows
        token = linear(rms_norm(rows, states.token_norm, eps), states.from_token)
        state = rms_norm(torch.from_numpy(batch.states), states.state_norm, eps)
        return token + linear(state, states.from_state)

    def _attention(
        self, index: int, layer: DecoderLayer, hidden: torch.Tensor, step: _Step
    ) -> torch.Tensor:
        weights = self._weights
        rows = rms_norm(hidden, layer.attention_norm, weights.norm_eps)
        heads = linear(rows, layer.qkv).view(len(rows), -1, weights.padded_head_dim)
        heads = heads[:, :, : weights.head_dim]
        if layer.qkv_bias is not None:
            heads = heads + layer.qkv_bias.view(1, -1, weights.head_dim)
        k_start, v_start = weights.num_heads, weights.num_heads + weights.num_kv_heads
        q, k, v = heads[:, :k_start], heads[:, k_start:v_start], heads[:, v_start:]
        q = self._placed(q, layer.q_norm, step)  # [T, Hq, head_dim]
        k = self._placed(k, layer.k_norm, step)  # [T, Hkv, head_dim]
        kv_write(k, v.contiguous(), step.kv, index, step.pages, step.offsets, step.layout)
        step.written(index, len(weights.layers))
        attended = paged_attention(
            q,
            step.kv,
            index,
            step.batch,
            step.layout,
            weights.attention_scale,
            window=layer.window,
        )
        return linear(attended.flatten(1), layer.out, layer.out_bias)

    def _placed(self, heads: torch.Tensor, norm: torch.Tensor | None, step: _Step) -> torch.Tensor:
        """Heads [T, N, head_dim] normalised, if the model does so, and rotated by position."""
        if norm is not None:
            rows = heads.reshape(-1, self._weights.head_dim)
            heads = rms_norm(rows, norm, self._weights.norm_eps).view(heads.shape)
        return rope(heads, step.positions, self._weights.cos, self._weights.sin)

    def _mlp(self, layer: DecoderLayer, hidden: torch.Tensor) -> torch.Tensor:
        rows = rms_norm(hidden, layer.mlp_norm, self._weights.norm_eps)
        both = linear(rows, layer.gate_up, layer.gate_up_bias)
        both = both.view(len(rows), -1, 2, FEED_FORWARD_BLOCK)
        gate, up = both[:, :, 0].flatten(1), both[:, :, 1].flatten(1)
        inner = silu_mul(gate.contiguous(), up.contiguous())[:, : layer.down.inputs]
        return linear(inner.contiguous(), layer.down, layer.down_bias)


def draft_by_steps(
    decoder: Decoder,
    rows: DraftRows,
    lengths: Sequence[int],
    ids: torch.Tensor,
    kv: torch.Tensor,
    layout: PageLayout,
) -> list[list[int]]:
    """``Decoder.draft``, a forward for each draft."""
    drafts: list[list[int]] = [[] for _ in lengths]
    for depth in range(max(lengths, default=0)):
        rows = rows.first(sum(length > depth for length in lengths))
        states = np.empty((len(rows.tokens), len(rows.states[0])), dtype=np.float32)
        best = decoder.forward(rows.batch(True, states), kv, layout)
        assert isinstance(best, list)
        tokens = [-1 if index < 0 else int(ids[index]) for index in best]
        for draft, token in zip(drafts, tokens, strict=False):
            draft.append(token)
        rows = rows.after([max(token, 0) for token in tokens], list(states))
    return drafts


class _Step:
    """What every layer of one forward needs besides the rows."""

    def __init__(self, batch: RaggedBatch, kv: torch.Tensor, layout: PageLayout) -> None:
        self.batch = batch
        self.kv = kv
        self.layout = layout
        self.positions = torch.from_numpy(batch.positions)
        self.pages, self.offsets = row_slots(batch, layout.page_size)
        self._base = batch.progress.num_done if batch.progress else 0

    def written(self, layer: int, num_layers: int) -> None:
        if self.batch.progress is not None:
            self.batch.progress.layer_done(self._base, layer, num_layers)
