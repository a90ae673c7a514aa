"""Weights from a file to the tensors the forward pass reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import xxhash

from engine.errors import ModelError
from engine.model import freed_memory
from engine.model.config import LlamaConfig
from engine.model.packed_cache import Parts, through_cache
from engine.model.weight_modes import MatrixSource, pack
from engine.progress import ProgressSink
from kernels.decoder import DecoderLayer, DecoderWeights, gate_up_rows, qkv_rows
from kernels.packed_matrix import PackedMatrix
from kernels.quantized import QuantizedMatrix
from kernels.rope import rope_tables


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: its shape, how to read it as fp32, and its bytes as stored.

    ``quantized`` gives a matrix as the very integers the file has, and ``read`` its
    ``dequantize()``, bit for bit; None where there are none in groups of neighbouring columns.
    """

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    stored: Callable[[], memoryview]
    quantized: Callable[[], QuantizedMatrix] | None = None


@dataclass(frozen=True, slots=True)
class Matrices:
    """Some of a model's matrices: weights in all, and their bytes with scales, nothing padded."""

    num_weights: int
    num_bytes: int


def layer_matrices(weights: DecoderWeights) -> Matrices:
    """What all layers together multiply with."""
    heads = (weights.num_heads + 2 * weights.num_kv_heads) * weights.head_dim
    rows = [
        (matrix, num_rows)
        for layer in weights.layers
        for matrix, num_rows in (
            (layer.qkv, heads),
            (layer.out, layer.out.outputs),
            (layer.gate_up, 2 * layer.down.inputs),
            (layer.down, layer.down.outputs),
        )
    ]
    return _matrices(rows)


def head_matrix(weights: DecoderWeights) -> Matrices:
    return _matrices([(weights.head, weights.head.outputs)])


def _matrices(rows: Sequence[tuple[PackedMatrix, int]]) -> Matrices:
    """Of so many rows of each matrix; the others are padding."""
    return Matrices(
        sum(num_rows * matrix.inputs for matrix, num_rows in rows),
        sum(num_rows * matrix.weight_bytes // matrix.outputs for matrix, num_rows in rows),
    )


def step_bytes(weights: DecoderWeights) -> int:
    """What one decode step must read: everything but the embedding, of which it reads rows."""
    vectors = [weights.norm]
    for layer in weights.layers:
        parts = [getattr(layer, field.name) for field in fields(layer)]
        vectors += [part for part in parts if isinstance(part, torch.Tensor)]
    matrices = layer_matrices(weights).num_bytes + head_matrix(weights).num_bytes
    return matrices + sum(vector.nbytes for vector in vectors)


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
) -> tuple[DecoderWeights, str]:
    """The weights in the mode asked for, and the model's digest (32 hex digits).

    The digest covers hyperparameters, names and bytes as stored, not the mode.
    """
    check_shapes(config, stored)
    digest = _digest(config, stored, progress)
    parts = through_cache(digest, mode, lambda: _read_parts(config, stored, mode, progress))
    return _assembled(config, parts), digest


def _digest(config: LlamaConfig, stored: Mapping[str, StoredTensor], progress: ProgressSink) -> str:
    digest = hashlib.blake2b(repr(config).encode(), digest_size=16, key=b"quire model digest")
    with progress.begin("reading weights", len(stored)):
        for name in sorted(stored):
            digest.update(name.encode())
            digest.update(xxhash.xxh3_128_digest(stored[name].stored()))
            progress.advance()
    return digest.hexdigest()


def _assembled(config: LlamaConfig, parts: Parts) -> DecoderWeights:
    layers: list[dict[str, Any]] = [{"window": window} for window in config.windows]
    tables: dict[str, Any] = {}
    for name, part in parts.items():
        if name.startswith("layers."):
            _, index, field = name.split(".")
            layers[int(index)][field] = part
        else:
            tables[name] = part
    cos, sin = rope_tables(config.max_context, config.head_dim, config.rope_theta, config.rope)
    return DecoderWeights(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        norm_eps=config.norm_eps,
        attention_scale=config.head_dim**-0.5,
        layers=tuple(DecoderLayer(**layer) for layer in layers),
        cos=cos,
        sin=sin,
        **{"head": tables["embedding"], **tables},
    )


def _read_parts(
    config: LlamaConfig, stored: Mapping[str, StoredTensor], mode: str, progress: ProgressSink
) -> Parts:
    """Fields of DecoderWeights, and of its layers as ``layers.3.qkv``; no head if it is tied."""
    reader = _Reader(stored, mode, progress)
    with progress.begin("packing weights", len(stored)):
        parts: Parts = {
            "embedding": reader.matrix("model.embed_tokens", vocabulary=True),
            "norm": reader.vector("model.norm.weight"),
        }
        if not config.tied_head:
            parts["head"] = reader.matrix("lm_head", vocabulary=True)
        for index in range(config.num_layers):
            for name, part in _layer(reader, config, f"model.layers.{index}.").items():
                parts[f"layers.{index}.{name}"] = part
            freed_memory.give_back()
    return parts


def _layer(reader: _Reader, config: LlamaConfig, prefix: str) -> Parts:
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    qkv, out = [f"{attention}{each}_proj" for each in "qkv"], attention + "o_proj"
    gate_up, down = [mlp + "gate_proj", mlp + "up_proj"], mlp + "down_proj"
    qkv_order = qkv_rows(config.num_heads + 2 * config.num_kv_heads, config.head_dim)
    gate_up_order = gate_up_rows(config.intermediate_size)
    parts: Parts = {
        "attention_norm": reader.vector(prefix + "input_layernorm.weight"),
        "qkv": reader.matrix(*qkv, order=qkv_order),
        "out": reader.matrix(out),
        "mlp_norm": reader.vector(prefix + "post_attention_layernorm.weight"),
        "gate_up": reader.matrix(*gate_up, order=gate_up_order),
        "down": reader.matrix(down),
    }
    if config.attention_bias:
        parts["qkv_bias"] = reader.vector(*[f"{each}.bias" for each in qkv])
    if config.output_bias:
        parts["out_bias"] = reader.vector(f"{out}.bias")
    if config.mlp_bias:
        biases = [f"{each}.bias" for each in gate_up]
        parts["gate_up_bias"] = reader.vector(*biases, order=gate_up_order)
        parts["down_bias"] = reader.vector(f"{down}.bias")
    if config.qk_norm:
        parts["q_norm"] = reader.vector(attention + "q_norm.weight")
        parts["k_norm"] = reader.vector(attention + "k_norm.weight")
    return parts


class _Reader:
    """Reads tensors in the mode asked for."""

    def __init__(
        self, stored: Mapping[str, StoredTensor], mode: str, progress: ProgressSink
    ) -> None:
        self._stored = stored
        self._mode = mode
        self._progress = progress

    def matrix(
        self, *names: str, order: torch.Tensor | None = None, vocabulary: bool = False
    ) -> PackedMatrix:
        """The matrices one below the other, their rows in ``order``."""
        parts = [self._source(f"{name}.weight") for name in names]
        return pack(self._mode, parts, order, vocabulary=vocabulary)

    def vector(self, *names: str, order: torch.Tensor | None = None) -> torch.Tensor:
        """The vectors one after the other, in ``order``, -1 standing for 0."""
        vector = torch.cat([self._source(name).read() for name in names])
        return vector if order is None else torch.cat((vector, vector.new_zeros(1)))[order]

    def _source(self, name: str) -> MatrixSource:
        tensor = self._stored[name]
        self._progress.advance()

        def read() -> torch.Tensor:
            return _finite(name, tensor.read())

        def quantized() -> QuantizedMatrix:
            assert tensor.quantized is not None
            matrix = tensor.quantized()
            for part in (matrix.scales, matrix.minimums):
                if part is not None:
                    _finite(name, part)
            return matrix

        return MatrixSource(read, quantized if tensor.quantized is not None else None)


def _finite(name: str, values: torch.Tensor) -> torch.Tensor:
    # A sum in fp64 is finite only if all are, and costs no second copy.
    with np.errstate(invalid="ignore"):
        total = values.numpy().sum(dtype=np.float64)
    if not np.isfinite(total):
        raise ModelError(f"tensor {name} holds NaN or infinity")
    return values
