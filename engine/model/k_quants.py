"""GGUF's formats of 256 weights (k-quants and IQ4_XS) to fp32, after ggml's block definitions.

A block is cut into groups with small integer scales under one or two fp16 ones; a weight is
``(d * scale) * q``, for the formats with minimums ``(d * scale) * q - (dmin * minimum)``, each
operation rounded once. Blocks are uint8 [num_blocks, bytes]; results are fp32 [num_blocks, 256].
"""

from __future__ import annotations

from typing import Any

import numpy as np

WEIGHTS = 256
IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
"""The 16 levels of the IQ4 formats."""

Array = Any  # numpy arrays; their operators are typed as Any


def halves(blocks: Array, start: int) -> Array:
    """The fp16 at byte ``start`` of every block, as fp32 [num_blocks, 1]."""
    half = np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2")
    return half.astype(np.float32)


def fields(packed: Array, run: int, bits: int) -> Array:
    """Unpacks bit fields: from each run of bytes the lowest field of every byte, then the next.

    ``packed`` uint8 [num_blocks, n]; returns uint8 [num_blocks, n * 8 / bits].
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, run)
    return ((runs >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def q2_k(blocks: Array) -> Array:
    """16 bytes of 4-bit scale and minimum, 64 bytes of 2-bit weights, fp16 d, fp16 dmin."""
    scales, minimums = blocks[:, :16] & 0x0F, blocks[:, :16] >> 4
    weights = fields(blocks[:, 16:80], run=32, bits=2)
    return _with_minimums(weights, halves(blocks, 80) * scales, halves(blocks, 82) * minimums)


def q3_k(blocks: Array) -> Array:
    """32 bytes of high bits, 64 bytes of low 2 bits, 12 bytes of 6-bit scales, fp16 d."""
    high, low = fields(blocks[:, :32], run=32, bits=1), fields(blocks[:, 32:96], run=32, bits=2)
    scales = fields(blocks[:, 96:104], run=8, bits=4) | fields(blocks[:, 104:108], 4, 2) << 4
    weights = (low | high << 2).astype(np.float32) - np.float32(4)
    return _scaled(weights, halves(blocks, 108) * (scales.astype(np.float32) - np.float32(32)))


def q4_k(blocks: Array) -> Array:
    """fp16 d, fp16 dmin, 12 bytes of 6-bit scales and minimums, 128 bytes of 4-bit weights."""
    scales, minimums = _scales_and_minimums(blocks[:, 4:16])
    weights = fields(blocks[:, 16:], run=32, bits=4)
    return _with_minimums(weights, halves(blocks, 0) * scales, halves(blocks, 2) * minimums)


def q5_k(blocks: Array) -> Array:
    """Q4_K with 32 bytes of fifth bits before the 4-bit weights."""
    scales, minimums = _scales_and_minimums(blocks[:, 4:16])
    fifth = fields(blocks[:, 16:48], run=32, bits=1)
    weights = fields(blocks[:, 48:], run=32, bits=4) | fifth << 4
    return _with_minimums(weights, halves(blocks, 0) * scales, halves(blocks, 2) * minimums)


def q6_k(blocks: Array) -> Array:
    """128 bytes of low 4 bits, 64 bytes of high 2 bits, 16 int8 scales, fp16 d."""
    low, high = fields(blocks[:, :128], run=64, bits=4), fields(blocks[:, 128:192], run=32, bits=2)
    weights = (low | high << 4).astype(np.float32) - np.float32(32)
    return _scaled(weights, halves(blocks, 208) * blocks[:, 192:208].view(np.int8))


def iq4_xs(blocks: Array) -> Array:
    """fp16 d, 8 6-bit scales (high bits in 2 bytes, low in 4), 128 bytes of 4-bit levels."""
    low, high = fields(blocks[:, 4:8], run=1, bits=4), fields(blocks[:, 2:4], run=1, bits=2)
    scales = (low | high << 4).astype(np.float32) - np.float32(32)
    return _scaled(IQ4_VALUES[fields(blocks[:, 8:], run=16, bits=4)], halves(blocks, 0) * scales)


def _scales_and_minimums(packed: Array) -> tuple[Array, Array]:
    """8 scales and 8 minimums of 6 bits, from 12 bytes.

    Bytes 0 to 3 hold scales 0 to 3, bytes 4 to 7 minimums 0 to 3. The others have their low 4 bits
    in bytes 8 to 11 (scales in the low nibbles), their high 2 bits on top of bytes 0 to 7.
    """
    scales, minimums, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (
        np.concatenate((scales & 0x3F, low & 0x0F | scales >> 6 << 4), axis=1),
        np.concatenate((minimums & 0x3F, low >> 4 | minimums >> 6 << 4), axis=1),
    )


def _scaled(weights: Array, scales: Array) -> Array:
    """One scale for each of as many equal groups of a block's weights."""
    groups = weights.reshape(*scales.shape, -1)
    return (scales[:, :, None] * groups).reshape(len(weights), WEIGHTS)


def _with_minimums(weights: Array, scales: Array, minimums: Array) -> Array:
    groups = weights.astype(np.float32).reshape(*scales.shape, -1)
    return (scales[:, :, None] * groups - minimums[:, :, None]).reshape(len(weights), WEIGHTS)
