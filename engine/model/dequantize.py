"""GGUF's block formats to fp32, exactly as ggml defines them: each operation rounded once.

Formats after the GGUF specification: here a block stands for 32 consecutive weights of a row, in
``k_quants`` for 256. Q8_0: fp16 scale d, 32 int8; w = d * q. Q4_0: fp16 d, 16 bytes; byte i holds
weights i (low nibble) and i + 16 (high nibble); w = d * (q - 8). Q4_1: fp16 d, fp16 m, 16 bytes;
w = d * q + m. Q5_0 and Q5_1 have 4 bytes of fifth bits before the nibbles and subtract 16 in place
of 8. IQ4_NL: fp16 d, 16 bytes that choose from 16 levels; w = d * level.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.model import k_quants
from engine.model.k_quants import IQ4_VALUES, Array, fields, halves

TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    20: "IQ4_NL",
    23: "IQ4_XS",
    30: "BF16",
}
"""The supported types by their number in a file."""

OTHER_TYPES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
"""The format's other types, to be refused by name."""

_BLOCKS_AT_ONCE = 1 << 12  # keeps what is half done in the cache, and peak memory near the result


@dataclass(frozen=True, slots=True)
class _Format:
    """``convert`` takes uint8 [num_blocks, num_bytes], gives fp32 [num_blocks, num_weights]."""

    num_weights: int
    num_bytes: int
    convert: Callable[[Array], Array]


def _nibbles(blocks: Array, start: int) -> Array:
    """The 16 bytes from ``start`` as [num_blocks, 32] values 0..15."""
    return fields(blocks[:, start : start + 16], run=16, bits=4)


def _five_bits(blocks: Array, start: int) -> Array:
    """4 bytes of fifth bits and 16 bytes of nibbles as fp32 [num_blocks, 32], 0..31."""
    fifth = fields(blocks[:, start : start + 4], run=1, bits=1)
    return (_nibbles(blocks, start + 4) | fifth << 4).astype(np.float32)


def _q8_0(blocks: Array) -> Array:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * halves(blocks, 0)


def _q4_0(blocks: Array) -> Array:
    return (_nibbles(blocks, 2).astype(np.float32) - np.float32(8)) * halves(blocks, 0)


def _q4_1(blocks: Array) -> Array:
    return _nibbles(blocks, 4).astype(np.float32) * halves(blocks, 0) + halves(blocks, 2)


def _q5_0(blocks: Array) -> Array:
    return (_five_bits(blocks, 2) - np.float32(16)) * halves(blocks, 0)


def _q5_1(blocks: Array) -> Array:
    return _five_bits(blocks, 4) * halves(blocks, 0) + halves(blocks, 2)


def _iq4_nl(blocks: Array) -> Array:
    return IQ4_VALUES[_nibbles(blocks, 2)] * halves(blocks, 0)


def _f32(data: Array) -> Array:
    return data.view("<f4")


def _f16(data: Array) -> Array:
    return data.view("<f2").astype(np.float32)


def _bf16(data: Array) -> Array:
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)


_FORMATS = {
    "F32": _Format(1, 4, _f32),
    "F16": _Format(1, 2, _f16),
    "BF16": _Format(1, 2, _bf16),
    "Q4_0": _Format(32, 18, _q4_0),
    "Q4_1": _Format(32, 20, _q4_1),
    "Q5_0": _Format(32, 22, _q5_0),
    "Q5_1": _Format(32, 24, _q5_1),
    "Q8_0": _Format(32, 34, _q8_0),
    "IQ4_NL": _Format(32, 18, _iq4_nl),
    "Q2_K": _Format(256, 84, k_quants.q2_k),
    "Q3_K": _Format(256, 110, k_quants.q3_k),
    "Q4_K": _Format(256, 144, k_quants.q4_k),
    "Q5_K": _Format(256, 176, k_quants.q5_k),
    "Q6_K": _Format(256, 210, k_quants.q6_k),
    "IQ4_XS": _Format(256, 136, k_quants.iq4_xs),
}


def dequantize(data: Array, kind: str, shape: tuple[int, ...]) -> Array:
    """``data`` uint8 [num_bytes] of GGUF type ``kind`` as a new fp32 array of ``shape``, row-major.

    A scale that is NaN or infinite makes its block's weights so; the caller looks for them.
    """
    form = _FORMATS[kind]
    blocks = data.reshape(-1, form.num_bytes)
    out = np.empty((len(blocks), form.num_weights), np.float32)
    step = _BLOCKS_AT_ONCE * 256 // form.num_weights
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            out[start : start + step] = form.convert(blocks[start : start + step])
    return out.reshape(shape)


def stored_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor stored as ``kind``. ValueError if its rows are not whole blocks."""
    form = _FORMATS[kind]
    if shape[-1] % form.num_weights:
        raise ValueError(f"rows of {shape[-1]} are not whole blocks of {form.num_weights}")
    return math.prod(shape) // form.num_weights * form.num_bytes
