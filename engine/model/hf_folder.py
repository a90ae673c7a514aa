"""Hugging Face folders: config.json, safetensors, tokenizer files. Never pickle, never code."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import ModelError

MAX_TEXT_BYTES = 64 << 20
_SKIPPED_SUFFIX = ".rotary_emb.inv_freq"  # a constant that old exports kept


@dataclass(frozen=True, slots=True)
class FolderTensor:
    """A tensor as it is stored: ``dtype`` is its name in safetensors, ``load`` converts nothing."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    def stored(self) -> memoryview:
        return self.load().contiguous().reshape(-1).view(torch.uint8).numpy().data


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
        found = json.loads(read_text(path), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path.name} is not a JSON object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What is said twice can be read in two ways."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{reprlib.repr(name)} is there twice")
        found[name] = value
    return found


def read_json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def folder_tensors(folder: Path, tied_head: bool) -> dict[str, FolderTensor]:
    """The folder's tensors by name, from one file or from the shards its index names."""
    stored: dict[str, FolderTensor] = {}
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
            raise ModelError(
                f"{index.name} names {reprlib.repr(file)}, no safetensors file of the folder"
            )
        files.setdefault(folder / file, set()).add(name)
    return files


def _tensors_of(path: Path) -> dict[str, FolderTensor]:
    try:
        file: Any = safe_open(path, framework="pt")
        stored = {}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            if name.endswith(_SKIPPED_SUFFIX):
                continue
            part = file.get_slice(name)
            stored[name] = FolderTensor(
                name, part.get_dtype(), tuple(part.get_shape()), partial(file.get_tensor, name)
            )
        return stored
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path.name} is not a readable safetensors file ({error})") from None
