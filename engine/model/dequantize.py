"""GGUF's block formats to fp32, exactly: one multiplication and at most one addition per weight.

Formats after the GGUF specification: a block stands for 32 consecutive weights of a row.
Q8_0: fp16 scale d, 32 int8; w = d * q. Q4_0: fp16 d, 16 bytes; byte i holds weights i (low nibble)
and i + 16 (high nibble); w = d * (q - 8). Q4_1: fp16 d, fp16 m, 16 bytes; w = d * q + m.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

BLOCK = 32


TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 8: "Q8_0", 30: "BF16"}
"""The supported types by their number in a file."""

Array = Any  # numpy arrays; their operators are typed as Any


def _halves(blocks: Array, start: int) -> Array:
    """The fp16 at byte ``start`` of every block, as fp32 [num_blocks, 1]."""
    half = np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2")
    return half.astype(np.float32)


def _nibbles(packed: Array) -> Array:
    """[num_blocks, 16] bytes to [num_blocks, 32] values 0..15."""
    return np.concatenate((packed & 0x0F, packed >> 4), axis=1).astype(np.float32)


def _q8_0(blocks: Array) -> Array:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _halves(blocks, 0)


def _q4_0(blocks: Array) -> Array:
    return (_nibbles(blocks[:, 2:]) - np.float32(8)) * _halves(blocks, 0)


def _q4_1(blocks: Array) -> Array:
    return _nibbles(blocks[:, 4:]) * _halves(blocks, 0) + _halves(blocks, 2)


def _f32(data: Array) -> Array:
    return data.view("<f4").astype(np.float32)


def _f16(data: Array) -> Array:
    return data.view("<f2").astype(np.float32)


def _bf16(data: Array) -> Array:
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)


_PLAIN: dict[str, tuple[int, Callable[[Array], Array]]] = {
    "F32": (4, _f32),
    "F16": (2, _f16),
    "BF16": (2, _bf16),
}
_BLOCKS: dict[str, tuple[int, Callable[[Array], Array]]] = {
    "Q8_0": (34, _q8_0),
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
}


def dequantize(data: Array, kind: str, shape: tuple[int, ...]) -> Array:
    """``data`` uint8 [num_bytes] of GGUF type ``kind`` as fp32 of ``shape``, row-major."""
    if kind in _PLAIN:
        return _PLAIN[kind][1](data).reshape(shape)
    size, convert = _BLOCKS[kind]
    return convert(data.reshape(-1, size)).reshape(shape)


def stored_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor stored as ``kind``. ValueError if its rows are not whole blocks."""
    count = int(np.prod(shape, dtype=object))
    if kind in _PLAIN:
        return count * _PLAIN[kind][0]
    if shape[-1] % BLOCK:
        raise ValueError(f"rows of {shape[-1]} are not whole blocks of {BLOCK}")
    return count // BLOCK * _BLOCKS[kind][0]
