"""GGUF files as models: tensors under Hugging Face names, mapped, checked before memory is taken.

Files of the llama architecture store rows of q and k in the order of interleaved rotary pairs; they
are put back into Hugging Face's order of halves, so that one rotation serves all files.
"""

from __future__ import annotations

import mmap
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.errors import ModelError
from engine.model import gguf_blocks
from engine.model.config import LlamaConfig
from engine.model.dequantize import OTHER_TYPES, TYPES, dequantize, stored_bytes
from engine.model.gguf_format import GgufError, TensorInfo, parse
from engine.model.weights import StoredTensor
from kernels.quantized import QuantizedMatrix

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# One spelling of a layer's number, so that no two names stand for one tensor.
_NAME = re.compile(r"(?:blk\.(?P<layer>0|[1-9][0-9]{0,4})\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """``kind`` is the GGUF type's name; ``data`` the bytes as stored, uint8, mapped."""

    name: str
    shape: tuple[int, ...]
    kind: str
    data: np.ndarray

    def values(self) -> np.ndarray:
        """The tensor as fp32 of its shape."""
        values: np.ndarray = dequantize(self.data, self.kind, self.shape)
        return values


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
    paired = {}  # tensors whose rows are rotary pairs side by side, with their number of heads
    if file.fields.get("general.architecture") == "llama":
        paired = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    stored = {}
    for name, tensor in file.tensors.items():
        if name == "rope_freqs.weight":  # a hyperparameter: config.rope has it
            continue
        hf_name = _hf_name(name)
        finish = _finish(paired.get(name.split(".")[-2]))
        stored[hf_name] = StoredTensor(
            shape=tensor.shape,
            read=partial(_read, tensor, finish),
            stored=partial(_bytes, tensor),
            quantized=partial(_quantized, tensor, finish) if _is_quantized(tensor) else None,
        )
    return stored


def halves_from_pairs(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows [num_heads * D, ...] with rotary pairs side by side, to pairs D/2 apart."""
    pairs = rows.view(num_heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _tensor(info: TensorInfo, data: np.ndarray) -> GgufTensor:
    kind = TYPES.get(info.type_id)
    if kind is None:
        shown, supported = OTHER_TYPES.get(info.type_id, info.type_id), ", ".join(TYPES.values())
        raise GgufError(f"tensor {info.name} has type {shown}; supported are {supported}")
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
    match = _NAME.fullmatch(name)
    if match is None or match["part"] not in _NAMES:
        raise ModelError(f"tensor {reprlib.repr(name)} does not belong to a llama model")
    part = f"{_NAMES[match['part']]}.{match['kind']}"
    return part if match["layer"] is None else f"model.layers.{match['layer']}.{part}"


def _finish(paired_heads: int | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """What is left to do to a tensor's rows after reading; they are checked to be whole heads."""
    if paired_heads is None:
        return lambda rows: rows
    return lambda rows: halves_from_pairs(rows, paired_heads)


def _read(tensor: GgufTensor, finish: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return finish(torch.from_numpy(tensor.values()))


def _is_quantized(tensor: GgufTensor) -> bool:
    return tensor.kind in gguf_blocks.KINDS and len(tensor.shape) == 2


def _quantized(
    tensor: GgufTensor, finish: Callable[[torch.Tensor], torch.Tensor]
) -> QuantizedMatrix:
    rows, columns = tensor.shape
    try:
        return gguf_blocks.quantized_matrix(tensor.data, tensor.kind, (rows, columns), finish)
    except ValueError as error:
        raise ModelError(f"tensor {tensor.name}: {error}") from None


def _bytes(tensor: GgufTensor) -> memoryview:
    return tensor.data.data
