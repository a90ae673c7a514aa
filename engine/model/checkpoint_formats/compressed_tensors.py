"""compressed-tensors checkpoints (llm-compressor), formats int-quantized and pack-quantized.

int-quantized: ``weight`` int8 [N, K] and ``weight_zero_point`` int8 [N, G]. pack-quantized:
``weight_packed`` int32 [N, ceil(K * bits / 32)], packed along K, ``weight_shape`` [N, K] and
``weight_zero_point`` int32 [ceil(N * bits / 32), G], packed along N; before packing, 2^(bits-1) was
added to make integers unsigned. Both: ``weight_scale`` [N, G], no zero points if symmetric, and
with actorder "group" ``weight_g_idx`` [K], the group of every column.

A config has one scheme or several; a module is of the first that its tensors fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from engine.errors import ModelError
from engine.model.checkpoint_formats.grouped import (
    GroupedMatrix,
    finite,
    group_of,
    scattered_columns,
)
from engine.model.checkpoint_formats.packing import unpack, words_for
from engine.model.checkpoint_formats.parts import FLOATS, Parts
from engine.model.checkpoint_formats.settings import Settings
from engine.model.hf_folder import FolderTensor

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "dense")
_SCATTERED = {None: False, "weight": False, "static": False, "group": True, "dynamic": True}


@dataclass(frozen=True, slots=True)
class _Scheme:
    """``group`` None is one scale per row; ``scattered`` groups are told by ``weight_g_idx``."""

    packed: bool
    bits: int
    group: int | None
    symmetric: bool
    scattered: bool


def compressed_tensors(settings: Settings) -> Callable[[Parts], GroupedMatrix | None]:
    """Raises ModelError for settings that are not supported."""
    settings.absent("kv_cache_scheme", "transform_config")
    sparsity = settings.section_if_there("sparsity_config")
    if sparsity is not None:
        sparsity.one_of("format", ("dense",), default="dense")
    groups = settings.section("config_groups")
    schemes = dict.fromkeys(_scheme(groups.section(name), settings) for name in groups)
    return partial(_take, tuple(scheme for scheme in schemes if scheme is not None))


def _scheme(group: Settings, settings: Settings) -> _Scheme | None:
    """One of ``config_groups``; None if its modules are stored as they were."""
    overall = settings.one_of("format", (*_FORMATS, "mixed-precision"))
    kind = group.one_of("format", _FORMATS, default=overall)
    if kind == "dense":
        return None
    group.absent("output_activations")
    activations = group.section_if_there("input_activations")
    if activations is not None:
        _check_activations(activations)
    weights = group.section("weights")
    packed = kind == "pack-quantized"
    weights.one_of("type", ("int",), default="int")
    weights.one_of("dynamic", (False,), default=False)
    by_group = weights.one_of("strategy", ("channel", "group")) == "group"
    return _Scheme(
        packed=packed,
        bits=weights.one_of("num_bits", (4, 8) if packed else (8,), default=8),
        group=weights.group_size() if by_group else None,
        symmetric=weights.one_of("symmetric", (True, False), default=True),
        scattered=_SCATTERED[weights.one_of("actorder", tuple(_SCATTERED))],
    )


def _check_activations(activations: Settings) -> None:
    """int8 found on the fly, which the weight mode does or leaves by itself."""
    activations.one_of("type", ("int",), default="int")
    activations.one_of("num_bits", (8,), default=8)
    activations.one_of("dynamic", (True,), default=False)


def _take(schemes: tuple[_Scheme, ...], parts: Parts) -> GroupedMatrix | None:
    """The matrix by the first scheme that fits; what the first one said if none does."""
    if not parts.has("weight_packed") and not parts.has("weight", "I8"):
        return None
    refusals = []
    for scheme in schemes:
        try:
            return _matrix(scheme, parts)
        except ModelError as refusal:
            refusals.append(refusal)
    if refusals:
        raise refusals[0]
    return None


def _matrix(scheme: _Scheme, parts: Parts) -> GroupedMatrix:
    weights = _packed(scheme.bits, parts) if scheme.packed else _plain(parts)
    rows, columns = weights.shape
    group = group_of(parts.module, scheme.group, columns)
    size = (rows, columns // group)
    scale = parts.tensor("weight_scale", FLOATS, size)
    found = [*weights.parts, scale]
    zeros: Callable[[], torch.Tensor] = partial(torch.full, size, 2 ** (scheme.bits - 1))
    if scheme.symmetric:
        parts.refuse("weight_zero_point", "symmetric")
    else:
        points, zeros = _zero_points(scheme, parts, size)
        found.append(points)
    groups = None
    if scheme.scattered:
        g_idx = parts.tensor("weight_g_idx", ("I32", "I64"), (columns,))
        groups = scattered_columns(g_idx, group)
        found.append(g_idx)
    else:
        parts.refuse("weight_g_idx", "in groups of neighbouring columns")
    return GroupedMatrix(
        layout=f"compressed-tensors {scheme.packed} {scheme.bits} {group}",
        parts=tuple(found),
        bits=scheme.bits,
        group=group,
        shape=weights.shape,
        values=weights.values,
        scales=lambda: finite(scale),
        zeros=zeros,
        columns=groups,
    )


@dataclass(frozen=True, slots=True)
class _Integers:
    parts: tuple[FolderTensor, ...]
    shape: tuple[int, int]
    values: Callable[[], torch.Tensor]  # [N, K] uint8


def _plain(parts: Parts) -> _Integers:
    weight = parts.tensor("weight", ("I8",), (None, None))
    rows, columns = weight.shape
    return _Integers((weight,), (rows, columns), partial(_unsigned, weight))


def _packed(bits: int, parts: Parts) -> _Integers:
    weight_shape = parts.tensor("weight_shape", ("I32", "I64"), (2,))
    rows, columns = weight_shape.load().tolist()
    if rows < 1 or columns < 1:
        raise ModelError(f"tensor {weight_shape.name} holds {rows} and {columns}, not a shape")
    packed = parts.tensor("weight_packed", ("I32",), (rows, words_for(columns, bits)))
    return _Integers(
        (packed, weight_shape), (rows, columns), lambda: unpack(packed.load(), bits)[:, :columns]
    )


def _zero_points(
    scheme: _Scheme, parts: Parts, size: tuple[int, int]
) -> tuple[FolderTensor, Callable[[], torch.Tensor]]:
    """The tensor that has them, and how to read them as [N, G] integers."""
    rows, num_groups = size
    if not scheme.packed:
        plain = parts.tensor("weight_zero_point", ("I8",), size)
        return plain, partial(_unsigned, plain)
    num_words = words_for(rows, scheme.bits)
    packed = parts.tensor("weight_zero_point", ("I32",), (num_words, num_groups))
    return packed, lambda: unpack(packed.load().T, scheme.bits)[:, :rows].T


def _unsigned(tensor: FolderTensor) -> torch.Tensor:
    """int8 plus 128, as uint8: the same bits but for the highest."""
    return tensor.load().view(torch.uint8) ^ 128
