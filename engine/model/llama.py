"""The llama-family decoder as a ``Model``."""

from __future__ import annotations

import torch

from engine.model import ModelSpec
from engine.model.config import LlamaConfig
from kernels.decoder import DecoderWeights, decoder
from kernels.layout import PageLayout
from kernels.ragged import RaggedBatch, Said


class LlamaModel:
    def __init__(self, config: LlamaConfig, weights: DecoderWeights, spec: ModelSpec) -> None:
        self.spec = spec
        self.config = config
        self.weights = weights
        self._decoder = decoder(weights)

    def forward(self, batch: RaggedBatch, kv: torch.Tensor, layout: PageLayout) -> Said:
        return self._decoder.forward(batch, kv, layout)
