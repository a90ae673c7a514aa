"""Packed weights kept between starts: packing takes seconds, mapping a file none.

A file is a safetensors container named after the model's digest, the weight mode and the packing's
version. It is mapped read-only in effect (private, copy on write), so that all processes of a host
share its pages, huge ones where the file system has them: a step reads every weight once, and looks
up few addresses then. Files are written under another name first and renamed: a file that is there
is whole. Nothing is ever removed; the folder may be emptied at any time.
"""

from __future__ import annotations

import fcntl
import json
import logging
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from kernels.huge_pages import ask_for_huge_pages
from kernels.packed_matrix import PackedMatrix

log = logging.getLogger(__name__)

Parts = dict[str, PackedMatrix | torch.Tensor]

# Raised whenever packed bytes change for the same weights.
_PACKING = 2
_ALIGNMENT = 64
_DTYPES = {"U8": torch.uint8, "F32": torch.float32}


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """``$QUIRE_CACHE_DIR``, or ``quire`` in the XDG cache folder; None if the variable is empty."""
    if "QUIRE_CACHE_DIR" in environ:
        return Path(environ["QUIRE_CACHE_DIR"]) if environ["QUIRE_CACHE_DIR"] else None
    base = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "quire"


def through_cache(digest: str, mode: str, build: Callable[[], Parts]) -> Parts:
    """The parts of a model in a mode: from the cache, else built and put there.

    Of several processes that start at once, one builds and the others wait for it. A cache that
    cannot be used is said so in the log, and does not stop a start.
    """
    folder = cache_folder()
    if folder is None:
        return build()
    path = folder / f"{digest}-{mode}-{_PACKING}.safetensors"
    parts, built = _load(path), None
    if parts is not None:
        return parts
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            parts = _load(path)
            if parts is None:
                built = build()
                _save(path, built)
                parts = _load(path)
    except OSError as error:
        log.warning("packed weights are not kept: %s", error)
    return parts or built or build()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; freed by the system if it dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _save(path: Path, parts: Parts) -> None:
    """Matrices first: their sizes are whole cache lines, and so every one starts on one."""
    ordered = sorted(parts, key=lambda name: not isinstance(parts[name], PackedMatrix))
    header: dict[str, Any] = {"__metadata__": {}}
    offset = 0
    for name in ordered:
        part = parts[name]
        data = _data(part)
        end = offset + data.nbytes
        dtype = next(key for key, each in _DTYPES.items() if each == data.dtype)
        header[name] = {
            "dtype": dtype,
            "shape": list(data.shape),
            "data_offsets": [offset, end],
        }
        if isinstance(part, PackedMatrix):
            header["__metadata__"][name] = json.dumps(_described(part))
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in ordered:
                file.write(_data(parts[name]).numpy().data)
            file.flush()
            os.fsync(file.fileno())
            # What is read into memory for a mapping can be in huge pages, what was written cannot.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _data(part: PackedMatrix | torch.Tensor) -> torch.Tensor:
    return (part.data if isinstance(part, PackedMatrix) else part).contiguous()


def _described(matrix: PackedMatrix) -> dict[str, Any]:
    return {
        field.name: getattr(matrix, field.name) for field in fields(matrix) if field.name != "data"
    }


def _load(path: Path) -> Parts | None:
    """The parts in a file, mapped; None if there is none or it is damaged."""
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            ask_for_huge_pages(memory)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("packed weights cannot be read: %s", error)
        return None
    try:
        return _parts(memory)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        log.warning("packed weights in %s are damaged: %r", path, error)
        return None


def _parts(memory: mmap.mmap) -> Parts:
    start = 8 + int.from_bytes(memory[:8], "little")
    header = json.loads(memory[8:start])
    described = header.pop("__metadata__")
    parts: Parts = {}
    for name, entry in header.items():
        dtype = _DTYPES[entry["dtype"]]
        first, end = entry["data_offsets"]
        count = (end - first) // dtype.itemsize
        data = torch.frombuffer(memory, dtype=dtype, count=count, offset=start + first)
        data = data.view(entry["shape"])
        known = described.get(name)
        parts[name] = data if known is None else PackedMatrix(data=data, **json.loads(known))
    return parts
