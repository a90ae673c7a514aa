"""Packed matrices of every kind a model can have, by name."""

from collections.abc import Callable

import torch

from kernels.packed_matrix import (
    PackedMatrix,
    pack_floats,
    pack_quantized,
    pack_rotated_int8,
    quantize_int4,
    round_up,
)
from kernels.quantized import QuantizedMatrix


def blocks(outputs: int, inputs: int, bits: int, group: int, offsets: str) -> QuantizedMatrix:
    """Random integers as a checkpoint ships them; inputs are cut to whole groups."""
    columns = round_up(inputs, group)
    groups = (outputs, columns // group)
    values = torch.randint(0, 2**bits, (outputs, columns), dtype=torch.uint8)
    values[:, inputs:] = 0
    scales = (torch.rand(groups) * 0.01).half().float()
    scales[:, -(-inputs // group) :] = 0
    if offsets == "minimums":
        return QuantizedMatrix(
            bits, group, values, scales, minimums=torch.randn(groups).half().float()
        )
    zeros = (
        torch.full(groups, 2.0 ** (bits - 1))
        if offsets == "none"
        else torch.randint(0, 2**bits + 1, groups).float()
    )
    return QuantizedMatrix(bits, group, values, scales, zeros=zeros)


def _rounded(outputs: int, inputs: int) -> PackedMatrix:
    weight = torch.nn.functional.pad(_random(outputs, inputs), (0, round_up(inputs, 32) - inputs))
    return pack_quantized(quantize_int4(weight), inputs)


def _random(outputs: int, inputs: int) -> torch.Tensor:
    return torch.randn(outputs, inputs) * 0.05


def _blocks(bits: int, group: int, offsets: str) -> Callable[[int, int], PackedMatrix]:
    return lambda n, k: pack_quantized(blocks(n, k, bits, group, offsets), k)


KINDS: dict[str, Callable[[int, int], PackedMatrix]] = {
    "f32": lambda n, k: pack_floats(_random(n, k), torch.float32),
    "bf16": lambda n, k: pack_floats(_random(n, k), torch.bfloat16),
    "int8-rotated": lambda n, k: pack_rotated_int8(_random(n, k)),
    "int8-none-32": _blocks(8, 32, "none"),
    "int8-zeros-128": _blocks(8, 128, "zeros"),
    "int4-rounded": _rounded,
    "int4-none-32": _blocks(4, 32, "none"),
    "int4-zeros-64": _blocks(4, 64, "zeros"),
    "int4-zeros-128": _blocks(4, 128, "zeros"),
    "int4-minimums-32": _blocks(4, 32, "minimums"),
}
