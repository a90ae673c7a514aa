"""How many threads the native kernels use: one pool per process, its size decided here. Torch has
one thread beside them, but where it works alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from math import ceil
from pathlib import Path

import torch

MAX_THREADS = 256


def configured_threads() -> int:
    """``QUIRE_THREADS`` if set (1 to 256, else ``ValueError``), otherwise the allowed cores."""
    text = os.environ.get("QUIRE_THREADS")
    if text is None:
        return allowed_cores()
    if not text.isdecimal() or not 1 <= int(text) <= MAX_THREADS:
        raise ValueError(f"QUIRE_THREADS must be in 1..{MAX_THREADS}, not {text!r}")
    return int(text)


def set_num_threads(count: int) -> None:
    """Resizes the pool; the caller of a kernel counts as one of ``count``. Results do not change.

    Raises ``ValueError`` outside 1 to 256. Waits for a running kernel to finish.
    """
    if not 1 <= count <= MAX_THREADS:
        raise ValueError(f"count must be in 1..{MAX_THREADS}, not {count}")
    import_module("kernels._native").set_num_threads(count)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Inside it, torch's operations use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def allowed_cores(root: Path = Path("/")) -> int:
    """Cores this process may use: its affinity mask, cut to its cgroup's CPU quota."""
    cores = min(len(os.sched_getaffinity(0)), MAX_THREADS)
    quota = cgroup_quota(root)
    return cores if quota is None else max(1, min(cores, ceil(quota)))


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of CPU time granted by cgroup v1 or v2, the least of all levels, or None."""
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[float]:
    """Reads ``proc/self/cgroup``: lines of ``id:controllers:path``, no controllers in v2."""
    mount = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for level in _levels(mount, path):
                yield from _quota(" ".join(_lines(level / "cpu.max")))
        elif "cpu" in controllers.split(","):
            for level in _levels(mount / "cpu", path):
                fields = _lines(level / "cpu.cfs_quota_us") + _lines(level / "cpu.cfs_period_us")
                yield from _quota(" ".join(fields))


def _levels(mount: Path, path: str) -> list[Path]:
    """The cgroup's folder and those above it, up to the mount point."""
    folder = mount / path.lstrip("/")
    return [folder, *(level for level in folder.parents if level.is_relative_to(mount))]


def _quota(text: str) -> list[float]:
    """``"<quota> <period>"`` in microseconds as cores; nothing where there is no limit."""
    fields = text.split()
    if len(fields) != 2 or fields[0] in ("max", "-1"):
        return []
    return [int(fields[0]) / int(fields[1])]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
