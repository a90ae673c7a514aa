"""What ``--weights`` means: the form in which a matrix of the model is kept and multiplied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.packed_matrix import (
    PackedMatrix,
    pack_floats,
    pack_quantized,
    pack_rotated_int8,
    quantize_int4,
    round_up,
)
from kernels.quantized import QuantizedMatrix, stacked


@dataclass(frozen=True, slots=True)
class MatrixSource:
    """One matrix of a checkpoint; ``quantized`` is None where it has no integers to keep."""

    read: Callable[[], torch.Tensor]
    quantized: Callable[[], QuantizedMatrix] | None = None


def pack(
    mode: str,
    parts: Sequence[MatrixSource],
    order: torch.Tensor | None = None,
    *,
    vocabulary: bool = False,
) -> PackedMatrix:
    """The matrices below each other, rows in ``order`` (-1: a row of zeros), as ``mode`` says.

    "int8": a checkpoint's own 8-bit blocks as they are, anything else rounded to 8 bits in rotated
    groups of 64; the tables of the ``vocabulary`` always, since blocks that are kept take inputs of
    16 bits, and the head is a third of a step's products then. "int4": a checkpoint's own 4-bit
    blocks as they are, anything else rounded to groups of 32 with a scale and a minimum; the tables
    of the ``vocabulary`` stay in 8 bits, where rounding costs most and saves least.
    """
    bits = {"int8": 8, "int4": 8 if vocabulary else 4}.get(mode)
    kept = None
    if bits is not None and not (mode == "int8" and vocabulary):
        kept = _kept(parts, bits)
    if kept is not None:
        return pack_quantized(kept if order is None else kept.rows(order))
    weight = torch.cat([part.read() for part in parts])
    if order is not None:
        weight = torch.cat((weight, weight.new_zeros(1, weight.shape[1])))[order]
    if bits is None:
        return pack_floats(weight, torch.float32 if mode == "fp32" else torch.bfloat16)
    if bits == 8:
        return pack_rotated_int8(weight)
    inputs = weight.shape[1]
    padded = F.pad(weight, (0, round_up(inputs, 32) - inputs))
    return pack_quantized(quantize_int4(padded), inputs)


def _kept(parts: Sequence[MatrixSource], bits: int) -> QuantizedMatrix | None:
    if any(part.quantized is None for part in parts):
        return None
    found = [part.quantized() for part in parts if part.quantized is not None]
    if any(each.bits != bits or each.group % 32 for each in found):
        return None
    return stacked(found)
