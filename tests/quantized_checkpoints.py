"""Writers of quantized checkpoints, by what their formats' documents say of the layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # outputs of a word, from its lowest bits on


@dataclass(frozen=True)
class Integers:
    """A matrix in integers; ``columns`` has the group of every column."""

    bits: int
    values: np.ndarray  # [N, K], 0 .. 2^bits - 1
    scales: torch.Tensor  # [N, G], of the dtype to be stored
    zeros: np.ndarray  # [N, G], 0 .. 2^bits - 1
    columns: np.ndarray  # [K]

    @property
    def group(self) -> int:
        return self.values.shape[1] // self.zeros.shape[1]

    def weights(self) -> torch.Tensor:
        """[N, K] fp32: the product in fp64, rounded once."""
        scales = self.scales.to(torch.float64).numpy()[:, self.columns]
        exact = scales * (self.values - self.zeros[:, self.columns])
        return torch.from_numpy(exact.astype(np.float32))


def random_integers(
    seed: int,
    shape: tuple[int, int],
    bits: int,
    group: int,
    *,
    symmetric: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Integers:
    """Every value and every zero point may occur."""
    chance = np.random.default_rng(seed)
    rows, columns = shape
    size = (rows, columns // group)
    zeros = chance.integers(0, 2**bits, size)
    zeros = np.full(size, 2 ** (bits - 1)) if symmetric else zeros
    return Integers(
        bits,
        chance.integers(0, 2**bits, shape),
        torch.from_numpy(chance.uniform(1e-4, 0.1, size)).to(dtype),
        zeros,
        np.arange(columns) // group,
    )


def rounded(
    weight: torch.Tensor, bits: int, group: int, *, symmetric: bool, dtype: torch.dtype
) -> Integers:
    """The nearest integers to ``weight``, [N, K]."""
    groups = weight.view(len(weight), -1, group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    top = 2**bits - 1
    if symmetric:
        low, high = -torch.maximum(-low, high), torch.maximum(-low, high)
    scales = ((high - low) / top).to(dtype)
    zeros = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scales).round()
    zeros = zeros.clamp(1, top)
    values = (groups / scales.float().unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    return Integers(
        bits,
        values.clamp(0, top).view(weight.shape).numpy().astype(np.int64),
        scales,
        zeros.numpy().astype(np.int64),
        np.arange(weight.shape[1]) // group,
    )


def without_zero_points_of_0(integers: Integers) -> Integers:
    return replace(integers, zeros=np.maximum(integers.zeros, 1))


def scattered(integers: Integers, seed: int = 0) -> Integers:
    """The same groups of other columns."""
    return replace(integers, columns=np.random.default_rng(seed).permutation(integers.columns))


def words(rows: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """[R, C] integers to int32 [R, ceil(C * bits / 32)]; place i of a word holds ``order[i]``."""
    per_word = 32 // bits
    order = tuple(range(per_word)) if order is None else order
    packed = np.zeros((rows.shape[0], -(-rows.shape[1] // per_word)), np.uint32)
    for column in range(rows.shape[1]):
        shift = np.uint32(bits * order.index(column % per_word))
        packed[:, column // per_word] |= rows[:, column].astype(np.uint32) << shift
    return torch.from_numpy(packed.view(np.int32))


def gptq(integers: Integers, version: int = 1) -> Tensors:
    """Version 1 stores zero points less 1 and has none of 0."""
    assert version == 2 or integers.zeros.min() > 0
    bits = integers.bits
    return {
        "qweight": words(integers.values, bits).T.contiguous(),
        "qzeros": words((integers.zeros - (version == 1)).T, bits),
        "scales": integers.scales.T.contiguous(),
        "g_idx": torch.from_numpy(integers.columns.astype(np.int32)),
    }


def awq(integers: Integers) -> Tensors:
    return {
        "qweight": words(integers.values.T, 4, AWQ_ORDER),
        "qzeros": words(integers.zeros.T, 4, AWQ_ORDER),
        "scales": integers.scales.T.contiguous(),
    }


def pack_quantized(integers: Integers, *, symmetric: bool, ordered: bool = False) -> Tensors:
    tensors = {
        "weight_packed": words(integers.values, integers.bits),
        "weight_scale": integers.scales,
        "weight_shape": torch.tensor(integers.values.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(integers.zeros.T, integers.bits).T.contiguous()
    if ordered:
        tensors["weight_g_idx"] = torch.from_numpy(integers.columns.astype(np.int32))
    return tensors


def int_quantized(integers: Integers, *, symmetric: bool) -> Tensors:
    tensors = {
        "weight": torch.from_numpy((integers.values - 128).astype(np.int8)),
        "weight_scale": integers.scales,
    }
    if not symmetric:
        tensors["weight_zero_point"] = torch.from_numpy((integers.zeros - 128).astype(np.int8))
    return tensors


def gptq_config(bits: int, group_size: int, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": False,
        "checkpoint_format": "gptq",
        "lm_head": False,
    } | changes


def awq_config(group_size: int, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    } | changes


def compressed_config(
    kind: str, bits: int, group_size: int | None, symmetric: bool, **weights: Any
) -> dict[str, Any]:
    """One group of all Linear layers; ``weights`` changes its arguments."""
    arguments = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "block_structure": None,
    }
    group = {
        "targets": ["Linear"],
        "weights": arguments | weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def write_quantized(
    folder: Path,
    dense: Path,
    config: Mapping[str, Any],
    quantize: Callable[[torch.Tensor], tuple[Integers, Tensors]],
) -> tuple[Path, Path]:
    """Two copies of the folder ``dense``: its projections quantized, and what they stand for."""
    tensors = load_file(dense / "model.safetensors")
    quantized, meant = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if "_proj." not in name or weight.ndim == 1:
            continue
        integers, parts = quantize(weight)
        del quantized[name]
        module = name.removesuffix(".weight")
        quantized |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
        meant[name] = integers.weights()
    raw = json.loads((dense / "config.json").read_text())
    settings = {"quantization_config": config}
    return (
        _copy(dense, folder / "quantized", raw | settings, quantized),
        _copy(dense, folder / "meant", raw, meant),
    )


def _copy(source: Path, target: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target
