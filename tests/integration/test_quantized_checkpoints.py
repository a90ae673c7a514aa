"""Whole models in quantized folders compute what their dequantized weights compute."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import ModelError
from engine.model.load import load_model
from tests.paged_run import all_logits
from tests.quantized_checkpoints import (
    Integers,
    Tensors,
    awq,
    awq_config,
    compressed_config,
    gptq,
    gptq_config,
    int_quantized,
    pack_quantized,
    rounded,
    scattered,
    write_quantized,
)
from tests.tiny_models import TOKENS, write_folder

Pack = Callable[[Integers], Tensors]
BF16, FP16 = torch.bfloat16, torch.float16
ORDERED = partial(pack_quantized, symmetric=False, ordered=True)


def compressed(kind: str, bits: int, group: int | None, symmetric: bool, **more: Any) -> Any:
    pack = pack_quantized if kind == "pack-quantized" else int_quantized
    config = compressed_config(kind, bits, group, symmetric, **more)
    return config, partial(pack, symmetric=symmetric), bits, group, symmetric, BF16


MODELS: dict[str, tuple[dict[str, Any], Pack, int, int | None, bool, torch.dtype]] = {
    "gptq 4 bits": (gptq_config(4, 128), gptq, 4, 128, True, FP16),
    "gptq 4 bits, zero points": (gptq_config(4, 32), gptq, 4, 32, False, FP16),
    "gptq 8 bits per row": (gptq_config(8, -1), gptq, 8, None, False, FP16),
    "gptq v2": (
        gptq_config(4, 64, checkpoint_format="gptq_v2"),
        partial(gptq, version=2),
        4,
        64,
        False,
        FP16,
    ),
    "gptq in order of activations": (
        gptq_config(4, 32, desc_act=True),
        gptq,
        4,
        32,
        False,
        FP16,
    ),
    "awq": (awq_config(128), awq, 4, 128, False, FP16),
    "awq per row": (awq_config(-1), awq, 4, None, False, FP16),
    "int8 per row": compressed("int-quantized", 8, None, True),
    "int8 in groups, zero points": compressed("int-quantized", 8, 64, False),
    "packed 4 bits": compressed("pack-quantized", 4, 32, True),
    "packed 4 bits per row, zero points": compressed("pack-quantized", 4, None, False),
    "packed 8 bits": compressed("pack-quantized", 8, 128, True),
    "packed in order of activations": (
        compressed_config("pack-quantized", 4, 32, False, actorder="group"),
        ORDERED,
        4,
        32,
        False,
        BF16,
    ),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every matrix has columns for groups of 128."""
    folder = tmp_path_factory.mktemp("dense") / "tiny"
    return write_folder(folder, hidden_size=128, intermediate_size=256)


def write(tmp_path: Path, dense: Path, model: str) -> tuple[Path, Path]:
    config, pack, bits, group, symmetric, dtype = MODELS[model]

    def quantize(weight: torch.Tensor) -> tuple[Integers, Tensors]:
        size = weight.shape[1] if group is None else group
        integers = rounded(weight, bits, size, symmetric=symmetric, dtype=dtype)
        if "order" in model:
            integers = scattered(integers)
        return integers, pack(integers)

    return write_quantized(tmp_path, dense, config, quantize)


@pytest.mark.parametrize("model", MODELS)
def test_a_quantized_folder_computes_what_its_weights_mean(
    tmp_path: Path, dense: Path, model: str
) -> None:
    quantized, meant = (load_model(str(path)) for path in write(tmp_path, dense, model))
    inputs = [list(range(40)), [len(TOKENS) - 1, 7, 7]]
    found = all_logits(quantized.model, inputs, chunks=(16,))
    expected = all_logits(meant.model, inputs, chunks=(16,))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        assert torch.equal(ours, theirs)
    assert quantized.model.spec.digest != meant.model.spec.digest


@pytest.mark.parametrize("model", ["gptq 4 bits", "awq per row", "packed 8 bits", "int8 per row"])
def test_quantized_weights_are_near_those_they_were_made_of(
    tmp_path: Path, dense: Path, model: str
) -> None:
    """So that the models compared above are no noise."""
    _, meant = write(tmp_path, dense, model)
    exact = load_file(dense / "model.safetensors")
    most = {4: 0.15, 8: 0.01}[MODELS[model][2]]
    for name, weight in load_file(meant / "model.safetensors").items():
        assert (weight - exact[name]).norm() <= most * exact[name].norm()


def test_a_format_version_makes_another_digest(tmp_path: Path, dense: Path) -> None:
    folder, _ = write(tmp_path, dense, "gptq 4 bits")
    first = load_model(str(folder)).model.spec.digest
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (folder / "config.json").write_text(json.dumps(raw))
    assert load_model(str(folder)).model.spec.digest != first


# -- files that lie

LIARS = ["gptq in order of activations", "awq", "packed in order of activations", "int8 per row"]


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])


def lie(chance: random.Random, header: dict[str, Any]) -> None:
    """Another name, dtype or shape for one tensor, often one that fits its bytes."""
    name = chance.choice([each for each in header if "_proj." in each])
    tensor = header[name]
    shape = tensor["shape"]
    kind = chance.randrange(6)
    if kind == 0 or (kind == 1 and len(shape) == 1):
        shape.append(1)
    elif kind == 1:
        shape[0] *= 2
        shape[-1] //= 2
    elif kind == 2:
        tensor["shape"] = [chance.choice((0, 1, 2**31, 2**63 - 1)) for _ in shape]
    elif kind == 3:
        same_size = {"I32": "F32", "F16": "I16", "BF16": "I16", "I8": "U8", "I64": "F64"}
        tensor["dtype"] = same_size[tensor["dtype"]]
    elif kind == 4:
        header[name + "x"] = header.pop(name)
    else:
        module, _, suffix = name.rpartition(".")
        header[f"{module}.{suffix}_copy"] = header.pop(name)


@pytest.mark.parametrize("model", LIARS)
def test_a_header_that_lies_about_a_part_is_refused(
    tmp_path: Path, dense: Path, model: str
) -> None:
    folder, _ = write(tmp_path, dense, model)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    chance = random.Random(1)
    for _ in range(40):
        file.write_bytes(whole)
        rewrite_header(file, partial(lie, chance))
        with pytest.raises(ModelError):
            load_model(str(folder))
    file.write_bytes(whole)
    assert load_model(str(folder))


@pytest.mark.parametrize("model", LIARS)
def test_a_file_cut_off_is_refused(tmp_path: Path, dense: Path, model: str) -> None:
    folder, _ = write(tmp_path, dense, model)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            load_model(str(folder))


VALUES = [None, True, -1, 0, 3, 2**40, 1.5, "", "gemm", "x" * 10_000, [], [1], {}, {"a": {}}]


@pytest.mark.parametrize("model", LIARS)
def test_a_config_of_any_values_is_loaded_or_refused(
    tmp_path: Path, dense: Path, model: str
) -> None:
    folder, _ = write(tmp_path, dense, model)
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    refusals = 0
    for path in paths_of(raw["quantization_config"]):
        for value in VALUES:
            changed = json.loads(json.dumps(raw))
            place = changed["quantization_config"]
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value
            file.write_text(json.dumps(changed))
            refusals += is_refused(folder)
    assert refusals > 30


def is_refused(folder: Path) -> bool:
    try:
        load_model(str(folder))
    except ModelError:
        return True
    return False


def paths_of(settings: dict[str, Any]) -> list[tuple[str, ...]]:
    found = []
    for name, value in settings.items():
        found.append((name,))
        if isinstance(value, dict):
            found += [(name, *path) for path in paths_of(value)]
    return found
