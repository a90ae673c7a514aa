"""Hugging Face folders: config.json, safetensors, tokenizer files. Never pickle, never code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import ModelError
from engine.model.weights import StoredTensor

MAX_TEXT_BYTES = 64 << 20
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SKIPPED_SUFFIX = ".rotary_emb.inv_freq"  # a constant that old exports kept


def read_text(path: Path) -> str:
    """A file of UTF-8 text. Raises ModelError."""
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise ModelError(f"{path.name} is larger than {MAX_TEXT_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError."""
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path.name} is not a JSON object")
    return found


def read_json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def stored_tensors(folder: Path, tied_head: bool) -> dict[str, StoredTensor]:
    """The folder's tensors by name, from one file or from the shards its index names."""
    stored: dict[str, StoredTensor] = {}
    for path, names in _files(folder).items():
        found = _tensors_of(path)
        missing = names - found.keys()
        if missing:
            raise ModelError(f"{path.name} lacks tensor {min(missing)}")
        doubled = stored.keys() & found.keys()
        if doubled:
            raise ModelError(f"tensor {min(doubled)} is in two files")
        stored |= found
    if tied_head:
        stored.pop("lm_head.weight", None)  # some exports keep a copy
    return stored


def _files(folder: Path) -> Mapping[Path, set[str]]:
    """The safetensors files of a folder, with the tensors an index promises of each."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return {folder / "model.safetensors": set()}
    if not index.exists():
        pickled = [path.name for path in folder.glob("*.bin")] + [
            path.name for path in folder.glob("*.pt*")
        ]
        hint = f" ({min(pickled)} is pickled and never loaded)" if pickled else ""
        raise ModelError(f"{folder} has no model.safetensors{hint}")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise ModelError(f"{index.name} has no weight_map")
    files: dict[Path, set[str]] = {}
    for name, file in places.items():
        if Path(str(file)).name != file or not file.endswith(".safetensors"):
            raise ModelError(f"{index.name} names {file!r}, no safetensors file of the folder")
        files.setdefault(folder / file, set()).add(name)
    return files


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
    try:
        file: Any = safe_open(path, framework="pt")
        stored = {}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            if name.endswith(_SKIPPED_SUFFIX):
                continue
            part = file.get_slice(name)
            if part.get_dtype() not in _DTYPES:
                raise ModelError(
                    f"tensor {name} has dtype {part.get_dtype()}; "
                    f"supported are {', '.join(_DTYPES)}"
                )
            stored[name] = StoredTensor(
                shape=tuple(part.get_shape()),
                read=partial(_read, file, name),
                stored=partial(_bytes, file, name),
            )
        return stored
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path.name} is not a readable safetensors file ({error})") from None


def _read(file: Any, name: str) -> torch.Tensor:
    tensor: torch.Tensor = file.get_tensor(name)
    return tensor.to(torch.float32)


def _bytes(file: Any, name: str) -> memoryview:
    tensor: torch.Tensor = file.get_tensor(name)
    return tensor.contiguous().view(torch.uint8).reshape(-1).numpy().data
