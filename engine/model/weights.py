"""Weights from a file to the tensors the forward pass reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from engine.errors import ModelError
from engine.model.config import LlamaConfig
from engine.progress import ProgressSink

WEIGHT_MODES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: its shape, how to read it as fp32, and its bytes as stored."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    stored: Callable[[], memoryview]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Matrices are [rows out, columns in]; norms are fp32."""

    attention_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden]
    out: torch.Tensor  # [hidden, num_heads * head_dim]
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * intermediate, hidden]
    down: torch.Tensor  # [hidden, intermediate]


@dataclass(frozen=True, slots=True)
class Weights:
    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden]
    head: torch.Tensor  # [vocab, hidden], the embedding itself if tied

    @property
    def step_bytes(self) -> int:
        """What one decode step must read: everything but the embedding, of which it reads rows."""
        tensors = [self.norm, self.head]
        for layer in self.layers:
            tensors += [layer.attention_norm, layer.qkv, layer.out]
            tensors += [layer.mlp_norm, layer.gate_up, layer.down]
        return sum(tensor.nbytes for tensor in tensors)


def check_shapes(config: LlamaConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Before memory is taken: every tensor is there, none is left over, every shape fits."""
    wanted = config.shapes()
    for name, shape in wanted.items():
        if name not in stored:
            raise ModelError(f"tensor {name} is missing")
        if stored[name].shape != shape:
            raise ModelError(f"tensor {name} has shape {stored[name].shape}, not {shape}")
    extra = stored.keys() - wanted.keys()
    if extra:
        raise ModelError(f"tensor {min(extra)} does not belong to this model")


def load_weights(
    config: LlamaConfig,
    stored: Mapping[str, StoredTensor],
    mode: str,
    progress: ProgressSink,
) -> tuple[Weights, str]:
    """The weights in the mode asked for, and the model's digest (32 hex digits).

    The digest covers hyperparameters, names and bytes as stored, not the mode.
    """
    check_shapes(config, stored)
    digest = hashlib.blake2b(repr(config).encode(), digest_size=16, key=b"quire model digest")
    reader = _Reader(stored, WEIGHT_MODES[mode], progress, digest)
    with progress.begin("loading weights", len(stored)):
        embedding = reader.matrix("model.embed_tokens")
        layers = tuple(_layer(reader, index) for index in range(config.num_layers))
        norm = reader.norm("model.norm")
        head = embedding if config.tied_head else reader.matrix("lm_head")
    return Weights(embedding, layers, norm, head), digest.hexdigest()


def _layer(reader: _Reader, index: int) -> LayerWeights:
    prefix = f"model.layers.{index}."
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    return LayerWeights(
        attention_norm=reader.norm(prefix + "input_layernorm"),
        qkv=reader.matrix(*[f"{attention}{each}_proj" for each in "qkv"]),
        out=reader.matrix(attention + "o_proj"),
        mlp_norm=reader.norm(prefix + "post_attention_layernorm"),
        gate_up=reader.matrix(mlp + "gate_proj", mlp + "up_proj"),
        down=reader.matrix(mlp + "down_proj"),
    )


class _Reader:
    """Reads tensors in the mode asked for, hashing what is stored on the way."""

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        dtype: torch.dtype,
        progress: ProgressSink,
        digest: hashlib.blake2b,
    ) -> None:
        self._stored = stored
        self._dtype = dtype
        self._progress = progress
        self._digest = digest

    def norm(self, name: str) -> torch.Tensor:
        return self._read(name).clone()

    def matrix(self, *names: str) -> torch.Tensor:
        """The matrices one below the other, in one tensor of the mode's dtype."""
        parts = [self._read(name).to(self._dtype) for name in names]
        return torch.cat(parts) if len(parts) > 1 else parts[0].clone()

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._stored[f"{name}.weight"]
        self._digest.update(name.encode())
        self._digest.update(xxhash.xxh3_128_digest(tensor.stored()))
        self._progress.advance()
        values = tensor.read()
        # A sum in fp64 is finite only if all are, and costs no second copy.
        if not np.isfinite(values.numpy().sum(dtype=np.float64)):
            raise ModelError(f"tensor {name}.weight holds NaN or infinity")
        return values
