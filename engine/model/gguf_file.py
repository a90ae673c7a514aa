"""GGUF files as models: tensors under Hugging Face names, mapped, checked before memory is taken.

Rows of q and k are stored in the order of interleaved rotary pairs (llama.cpp's llama layout) and
put back into Hugging Face's order of halves, so that one rotation serves both kinds of files.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.errors import ModelError
from engine.model.config import LlamaConfig
from engine.model.dequantize import TYPES, dequantize, stored_bytes
from engine.model.gguf_format import GgufError, TensorInfo, parse
from engine.model.weights import StoredTensor

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """``kind`` is the GGUF type's name; ``data`` the bytes as stored, uint8, mapped."""

    name: str
    shape: tuple[int, ...]
    kind: str
    data: np.ndarray


@dataclass(frozen=True, slots=True)
class GgufFile:
    """``fields`` are the metadata values; ``tensors`` are by GGUF name."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def open_gguf(path: Path) -> GgufFile:
    """Maps a file and checks that every tensor lies inside it, alone. Raises ModelError."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        container = parse(memoryview(mapped))
    except (OSError, ValueError) as error:  # GgufError, or an empty file that cannot be mapped
        raise ModelError(f"{path.name} is not a readable GGUF file: {error}") from None
    data = np.frombuffer(mapped, dtype=np.uint8)
    try:
        tensors = [_tensor(info, data) for info in container.tensors]
        _check_overlap(container.tensors, tensors)
    except GgufError as error:
        raise ModelError(f"{path.name}: {error}") from None
    return GgufFile(container.fields, {tensor.name: tensor for tensor in tensors})


def stored_tensors(file: GgufFile, config: LlamaConfig) -> dict[str, StoredTensor]:
    """The file's tensors under Hugging Face names. Raises ModelError for a name that has none."""
    stored = {}
    for name, tensor in file.tensors.items():
        finish = _finish(name, config, tensor.shape)
        stored[_hf_name(name)] = StoredTensor(
            shape=tensor.shape,
            read=partial(_read, tensor, finish),
            stored=partial(_bytes, tensor),
        )
    return stored


def halves_from_pairs(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows [num_heads * D, K] with rotary pairs side by side, to pairs D/2 apart."""
    pairs = rows.view(num_heads, -1, 2, rows.shape[-1])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _tensor(info: TensorInfo, data: np.ndarray) -> GgufTensor:
    kind = TYPES.get(info.type_id)
    if kind is None:
        supported = ", ".join(TYPES.values())
        raise GgufError(f"tensor {info.name} has type {info.type_id}; supported are {supported}")
    try:
        size = stored_bytes(kind, info.shape)
    except ValueError as error:
        raise GgufError(f"tensor {info.name}: {error}") from None
    if info.offset + size > len(data):
        raise GgufError(f"tensor {info.name} ends after the file does")
    return GgufTensor(info.name, info.shape, kind, data[info.offset : info.offset + size])


def _check_overlap(infos: tuple[TensorInfo, ...], tensors: list[GgufTensor]) -> None:
    spans = sorted(
        (info.offset, info.offset + len(tensor.data), info.name)
        for info, tensor in zip(infos, tensors, strict=True)
    )
    for (_, end, before), (start, _, after) in pairwise(spans):
        if end > start:
            raise GgufError(f"tensors {before} and {after} overlap")


def _hf_name(name: str) -> str:
    """``blk.3.attn_q.weight`` to ``model.layers.3.self_attn.q_proj.weight``. Raises ModelError."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in _NAMES:
        return f"model.layers.{int(parts[1])}.{_NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in _NAMES:
        return f"{_NAMES[parts[0]]}.{parts[1]}"
    raise ModelError(f"tensor {name} does not belong to a llama model")


def _finish(
    name: str, config: LlamaConfig, shape: tuple[int, ...]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What is left to do to a tensor's rows after reading."""
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(name.split(".")[-2])
    if heads is None or shape[0] % (2 * heads):
        return lambda tensor: tensor
    return lambda tensor: halves_from_pairs(tensor, heads)


def _read(tensor: GgufTensor, finish: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return finish(torch.from_numpy(dequantize(tensor.data, tensor.kind, tensor.shape)))


def _bytes(tensor: GgufTensor) -> memoryview:
    return tensor.data.data
