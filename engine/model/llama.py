"""The llama-family decoder: one forward for prefill chunks, decode rows and verification rows."""

from __future__ import annotations

import torch

from engine.model import ModelSpec
from engine.model.config import LlamaConfig
from engine.model.weights import LayerWeights, Weights
from kernels.embedding import embedding
from kernels.kv_write import kv_write
from kernels.layout import PageLayout
from kernels.linear import linear
from kernels.paged_attention import paged_attention
from kernels.ragged import RaggedBatch, row_slots
from kernels.rms_norm import rms_norm
from kernels.rope import rope, rope_tables
from kernels.silu_mul import silu_mul


class LlamaModel:
    """Pre-norm decoder with grouped-query attention, rotary positions and a SwiGLU feed-forward
    (Touvron et al., 2023, arXiv:2302.13971)."""

    def __init__(self, config: LlamaConfig, weights: Weights, spec: ModelSpec) -> None:
        self.spec = spec
        self.config = config
        self._weights = weights
        self._cos, self._sin = rope_tables(config.max_context, config.head_dim, config.rope_theta)
        self._scale = config.head_dim**-0.5

    def forward(self, batch: RaggedBatch, kv: torch.Tensor, layout: PageLayout) -> torch.Tensor:
        step = _Step(batch, kv, layout)
        hidden = embedding(batch.token_ids, self._weights.embedding)  # [T, hidden]
        for index, layer in enumerate(self._weights.layers):
            hidden = hidden + self._attention(index, layer, hidden, step)
            hidden = hidden + self._mlp(layer, hidden)
        rows = rms_norm(hidden[batch.logit_rows], self._weights.norm, self.config.norm_eps)
        return linear(rows, self._weights.head)  # [R, vocab]

    def _attention(
        self, index: int, layer: LayerWeights, hidden: torch.Tensor, step: _Step
    ) -> torch.Tensor:
        config = self.config
        rows = rms_norm(hidden, layer.attention_norm, config.norm_eps)
        heads = linear(rows, layer.qkv).view(hidden.shape[0], -1, config.head_dim)
        k_start, v_start = config.num_heads, config.num_heads + config.num_kv_heads
        q, k, v = heads[:, :k_start], heads[:, k_start:v_start], heads[:, v_start:]
        positions = step.batch.positions
        q = rope(q, positions, self._cos, self._sin)  # [T, num_heads, head_dim]
        k = rope(k, positions, self._cos, self._sin)  # [T, num_kv_heads, head_dim]
        kv_write(k, v.contiguous(), step.kv, index, step.pages, step.offsets, step.layout)
        attended = paged_attention(q, step.kv, index, step.batch, step.layout, self._scale)
        return linear(attended.flatten(1), layer.out)

    def _mlp(self, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        rows = rms_norm(hidden, layer.mlp_norm, self.config.norm_eps)
        gate, up = linear(rows, layer.gate_up).chunk(2, dim=1)
        return linear(silu_mul(gate.contiguous(), up.contiguous()), layer.down)


class _Step:
    """What every layer of one forward needs besides the rows."""

    def __init__(self, batch: RaggedBatch, kv: torch.Tensor, layout: PageLayout) -> None:
        self.batch = batch
        self.kv = kv
        self.layout = layout
        self.pages, self.offsets = row_slots(batch, layout.page_size)
