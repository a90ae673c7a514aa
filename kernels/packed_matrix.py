"""A weight matrix in the form the products read: tiles of 32 outputs, each one run of bytes.

Inputs are padded with zeros to whole groups, outputs to whole tiles. A tile is::

    f32    [inputs][32]
    bf16   [inputs / 2][32][2]
    int8   per group: scales [32], offsets [32] if any, [group / 4][32][4] unsigned bytes
    int4   per group: scales [32], offsets [32] if any, [group / 8][32][4] bytes; of eight inputs
           the first four stand in the low halves of a lane's four bytes, the last four in the high

with 16-bit scales and offsets. ``kernels/csrc/multiply.cpp`` reads exactly this.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from math import prod
from typing import Any

import torch
import torch.nn.functional as F

from kernels.quantized import QuantizedMatrix
from kernels.rotation import ROTATION, rotate

TILE_OUTPUTS = 32
GROUPS = (32, 64, 128)
SYMMETRIC_ZERO = {"int8": 128, "int4": 8}
SCALE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class PackedMatrix:
    """``outputs`` x ``inputs`` weights; ``data`` is ``[tiles, tile bytes]`` uint8.

    ``format`` is "f32", "bf16", "int8" or "int4". Integers stand for
    ``scale * (value - zero)`` with ``offsets`` "none" (zero is the middle of the range) or
    "zeros", for ``scale * value + minimum`` with "minimums". ``rotated`` matrices hold ``H w / 64``
    for Walsh-Hadamard blocks of 64 inputs and are multiplied with ``H x`` (QuaRot: Ashkboos et al.,
    2024, arXiv:2404.00456). ``input_bits`` is the precision inputs are cut to before a product with
    integers: 8, or 16 in two signed planes.
    """

    outputs: int
    inputs: int
    format: str
    data: torch.Tensor
    group: int = ROTATION
    offsets: str = "none"
    scale_dtype: str = "fp16"
    rotated: bool = False
    input_bits: int = 0

    @property
    def padded_inputs(self) -> int:
        return round_up(self.inputs, max(self.group, ROTATION))

    @property
    def is_integer(self) -> bool:
        return self.format in SYMMETRIC_ZERO

    @cached_property
    def native(self) -> Any:
        """The matrix as the native kernels take it; shares ``data``."""
        return import_module("kernels._native").make_matrix(
            self.format,
            f"int{self.input_bits}" if self.is_integer else self.format,
            self.offsets,
            self.scale_dtype == "bf16",
            self.rotated,
            self.outputs,
            self.inputs,
            self.padded_inputs,
            self.group,
            self.data,
        )

    @cached_property
    def unpacked(self) -> torch.Tensor:
        """``[outputs, padded_inputs]`` fp32: what ``data`` stands for, rotated if the matrix is.

        Kept, for the reference implementations; the native ones never ask.
        """
        return _unpack(self)

    @property
    def weight_bytes(self) -> int:
        """What a product must read of it: weights, scales and offsets, nothing padded."""
        weights = self.outputs * self.inputs
        if not self.is_integer:
            return weights * (4 if self.format == "f32" else 2)
        per_group = 2 if self.offsets == "none" else 4
        scales = self.outputs * -(-self.inputs // self.group) * per_group
        return weights * (8 if self.format == "int8" else 4) // 8 + scales


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def split(x: torch.Tensor, dim: int, *sizes: int) -> torch.Tensor:
    """``x`` with one dimension cut into several of ``sizes``, one of which is -1: the rest."""
    rest = -x.shape[dim] // prod(sizes)
    found = [rest if size == -1 else size for size in sizes]
    return x.reshape(*x.shape[:dim], *found, *x.shape[dim + 1 :])


def pack_floats(weight: torch.Tensor, dtype: torch.dtype) -> PackedMatrix:
    """``weight [N, K]`` fp32 rounded to ``dtype``, fp32 or bf16."""
    outputs, inputs = weight.shape
    tiles = split(_padded(weight, ROTATION).to(dtype), 0, -1, TILE_OUTPUTS)
    if dtype == torch.float32:
        data = tiles.transpose(1, 2)
    else:
        data = split(tiles, 2, -1, 2).transpose(1, 2)
    name = "f32" if dtype == torch.float32 else "bf16"
    return PackedMatrix(outputs, inputs, name, _bytes(data).flatten(1))


def pack_rotated_int8(weight: torch.Tensor) -> PackedMatrix:
    """``weight [N, K]`` fp32 as 8-bit integers in groups of 64 of its rotated inputs."""
    outputs, inputs = weight.shape
    rotated = rotate(_padded(weight, ROTATION)) / ROTATION
    groups = split(rotated, 1, -1, ROTATION)
    scales = groups.abs().amax(dim=2) / 127
    dtype = _scale_dtype(scales)
    scales = scales.to(SCALE_DTYPES[dtype]).to(torch.float32)
    safe = torch.where(scales == 0, 1.0, scales)
    values = (groups / safe.unsqueeze(2)).round_().clamp_(-127, 127).add_(128).to(torch.uint8)
    data = _tiles("int8", values, scales, None, dtype)
    return PackedMatrix(
        outputs, inputs, "int8", data, scale_dtype=dtype, rotated=True, input_bits=8
    )


def pack_quantized(matrix: QuantizedMatrix, inputs: int | None = None) -> PackedMatrix:
    """A checkpoint's own integers and zeros or minimums, inputs cut to 16 bits.

    Columns from ``inputs`` on are padding. Scales are kept where they are fp16 or bf16 numbers,
    else rounded to fp16. Groups are split into pieces of at most 128 inputs, which share a scale.
    Raises ValueError for a group that is not a multiple of 32.
    """
    outputs, columns = matrix.shape
    inputs = columns if inputs is None else inputs
    group = next((size for size in reversed(GROUPS) if matrix.group % size == 0), None)
    if group is None:
        raise ValueError(f"group must be a multiple of {GROUPS[0]}, not {matrix.group}")
    repeats = matrix.group // group
    name = "int8" if matrix.bits == 8 else "int4"
    scales = matrix.scales.repeat_interleave(repeats, dim=1)
    offsets, kind = None, "none"
    if matrix.minimums is not None:
        offsets, kind = matrix.minimums.repeat_interleave(repeats, dim=1), "minimums"
    elif matrix.zeros is not None and not (matrix.zeros == SYMMETRIC_ZERO[name]).all():
        offsets, kind = matrix.zeros.repeat_interleave(repeats, dim=1), "zeros"
    padded_inputs = round_up(inputs, max(group, ROTATION))
    dtype = _scale_dtype(scales, offsets if kind == "minimums" else None)

    def padded(groups: torch.Tensor) -> torch.Tensor:
        return _pad_rows(F.pad(groups, (0, padded_inputs // group - groups.shape[1])))

    data = _tiles(
        name,
        split(_pad_rows(F.pad(matrix.values, (0, padded_inputs - columns))), 1, -1, group),
        padded(scales),
        None if offsets is None else padded(offsets),
        dtype,
    )
    return PackedMatrix(outputs, inputs, name, data, group, kind, dtype, False, 16)


def quantize_int4(weight: torch.Tensor) -> QuantizedMatrix:
    """``weight [N, K]`` fp32 rounded to 4 bits in groups of 32 with a scale and a minimum (fp16).

    K is padded with zeros to whole groups by the caller. The grid is that of GGUF's Q4_1.
    """
    groups = split(weight, 1, -1, 32)
    minimums = groups.amin(dim=2).half().float()
    scales = ((groups.amax(dim=2) - minimums) / 15).clamp_(min=0).half().float()
    safe = torch.where(scales == 0, 1.0, scales).unsqueeze(2)
    values = ((groups - minimums.unsqueeze(2)) / safe).round_().clamp_(0, 15).to(torch.uint8)
    return QuantizedMatrix(4, 32, values.flatten(1), scales, minimums=minimums)


def _unpack(matrix: PackedMatrix) -> torch.Tensor:
    tiles = len(matrix.data)
    inputs = matrix.padded_inputs
    if matrix.format == "f32":
        weight = matrix.data.view(torch.float32).view(tiles, inputs, TILE_OUTPUTS).transpose(1, 2)
    elif matrix.format == "bf16":
        pairs = matrix.data.view(torch.bfloat16).view(tiles, inputs // 2, TILE_OUTPUTS, 2)
        weight = pairs.transpose(1, 2).flatten(2).float()
    else:
        values, scales, offsets = _unpack_integers(matrix)
        zero = float(SYMMETRIC_ZERO[matrix.format]) if offsets is None else offsets.unsqueeze(2)
        each = scales.unsqueeze(2)
        if matrix.offsets == "minimums":
            return (values * each + zero).flatten(1)
        return ((values - zero) * each).flatten(1)
    return weight.reshape(tiles * TILE_OUTPUTS, inputs)[: matrix.outputs]


def _unpack_integers(
    matrix: PackedMatrix,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Values ``[N, groups, group]``, scales and offsets ``[N, groups]``, all as fp32."""
    tiles, groups = len(matrix.data), matrix.padded_inputs // matrix.group
    parts = matrix.data.view(tiles, groups, -1)
    dtype = SCALE_DTYPES[matrix.scale_dtype]
    heads = 1 if matrix.offsets == "none" else 2
    halves = split(parts[:, :, : 64 * heads].contiguous().view(dtype).float(), 2, heads, -1)
    halves = halves.permute(2, 0, 3, 1).flatten(1, 2)[:, : matrix.outputs]  # [heads, N, groups]
    stored = parts[:, :, 64 * heads :].reshape(tiles, groups, -1, TILE_OUTPUTS, 4)
    if matrix.format == "int4":
        stored = torch.stack((stored & 15, stored >> 4), dim=4)  # [..., 32, 2, 4]
        stored = stored.flatten(4)
    values = stored.permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)[: matrix.outputs]
    return values.float(), halves[0], halves[1] if heads == 2 else None


def _tiles(
    name: str,
    values: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    scale_dtype: str,
) -> torch.Tensor:
    """``values [N, groups, group]``, ``scales`` and ``offsets [N, groups]``; N in whole tiles."""
    tiles = split(values, 0, -1, TILE_OUTPUTS)  # [tiles, 32, groups, group]
    if name == "int4":
        eights = split(tiles, 3, -1, 2, 4)
        tiles = eights[..., 0, :] | eights[..., 1, :] << 4  # [tiles, 32, groups, group / 8, 4]
    else:
        tiles = split(tiles, 3, -1, 4)
    parts = [_bytes(tiles.permute(0, 2, 3, 1, 4)).flatten(2)]
    for each in (offsets, scales):
        if each is not None:
            lanes = split(each, 0, -1, TILE_OUTPUTS).transpose(1, 2)
            parts.insert(0, _bytes(lanes.to(SCALE_DTYPES[scale_dtype])))
    return torch.cat(parts, dim=2).flatten(1)


def _scale_dtype(scales: torch.Tensor, minimums: torch.Tensor | None = None) -> str:
    """fp16 unless only bf16 holds the numbers as they are, or fp16 would lose small ones."""
    numbers = scales if minimums is None else torch.cat((scales, minimums))
    used = numbers[numbers != 0].abs()
    if bool((numbers == numbers.half()).all()):
        return "fp16"
    if bool((numbers == numbers.bfloat16()).all()):
        return "bf16"
    return "fp16" if bool(((used >= 2.0**-14) & (used <= 65504)).all()) else "bf16"


def _padded(weight: torch.Tensor, group: int) -> torch.Tensor:
    inputs = weight.shape[1]
    return _pad_rows(F.pad(weight, (0, round_up(inputs, group) - inputs)))


def _pad_rows(rows: torch.Tensor) -> torch.Tensor:
    missing = round_up(len(rows), TILE_OUTPUTS) - len(rows)
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing))


def _bytes(data: torch.Tensor) -> torch.Tensor:
    return data.contiguous().view(torch.uint8)
