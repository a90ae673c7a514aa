"""Room beside the pool for pages of preempted sequences: host memory, or a file without a name.

A page is stored under its name (chain hash) and comes back only if its bytes still give the digest
taken when it left, over name and content (law 4). Nothing here raises for what a disk does: a page
that was not stored, or is not what it was, is not there, and is computed again.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

log = logging.getLogger(__name__)


class SwapError(OSError):
    """The room asked for cannot be had; the message says why."""


class Room(Protocol):
    """``num_slots`` slots of ``page_bytes`` each."""

    def write(self, slot: int, content: memoryview) -> None:
        """Raises OSError."""

    def read(self, slot: int, target: memoryview) -> None:
        """Fills ``target``. Raises OSError."""

    def close(self) -> None: ...


class MemoryRoom:
    """Host memory, made and touched at start."""

    def __init__(self, num_slots: int, page_bytes: int) -> None:
        self._rows = np.full((num_slots, page_bytes), 0xFF, dtype=np.uint8)

    def write(self, slot: int, content: memoryview) -> None:
        self._rows[slot] = content

    def read(self, slot: int, target: memoryview) -> None:
        target[:] = self._rows[slot].data

    def close(self) -> None: ...


class FileRoom:
    """A file in ``folder`` that has no name and vanishes with its process.

    All of it is allocated at start, so that a full disk is noticed then. Raises SwapError.
    """

    def __init__(self, folder: Path, num_slots: int, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise SwapError(f"no file in {folder}: {error.strerror}") from error
        try:
            os.posix_fallocate(self._file.fileno(), 0, num_slots * page_bytes)
        except OSError as error:
            self._file.close()
            size = f"{num_slots * page_bytes:,} bytes"
            raise SwapError(f"no {size} in {folder}: {error.strerror}") from error

    def write(self, slot: int, content: memoryview) -> None:
        offset = slot * self._page_bytes
        while content:
            written = os.pwrite(self._file.fileno(), content, offset)
            content, offset = content[written:], offset + written

    def read(self, slot: int, target: memoryview) -> None:
        offset = slot * self._page_bytes
        while target:
            num_read = os.preadv(self._file.fileno(), [target], offset)
            if not num_read:
                raise OSError("the file is shorter than it was")
            target, offset = target[num_read:], offset + num_read

    def close(self) -> None:
        self._file.close()


class SwapSpace:
    """Pages in a room, each with the digest it must have when it comes back. One thread uses it."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._digests: dict[int, bytes] = {}

    def store(self, slot: int, name: bytes, content: memoryview) -> bool:
        """Whether the page is in ``slot`` now."""
        self._digests.pop(slot, None)
        try:
            self._room.write(slot, content)
        except OSError as error:
            log.warning("a page was not swapped out: %s", error)
            return False
        self._digests[slot] = _digest(name, content)
        return True

    def load(self, slot: int, name: bytes, target: memoryview) -> bool:
        """Whether ``target`` holds the page ``name`` now, verified after the copy."""
        expected = self._digests.get(slot)
        if expected is None:
            return False
        try:
            self._room.read(slot, target)
        except OSError as error:
            log.warning("a page was not swapped in: %s", error)
            return False
        if _digest(name, target) != expected:
            log.warning("a swapped page is not what it was")
            return False
        return True

    def close(self) -> None:
        self._digests.clear()
        self._room.close()


def open_swap(swap_bytes: int, folder: Path | None, page_bytes: int) -> SwapSpace | None:
    """Room for as many pages as fit ``swap_bytes``; None for none. Raises SwapError."""
    num_slots = swap_bytes // page_bytes
    if not num_slots:
        return None
    if folder is None:
        return SwapSpace(MemoryRoom(num_slots, page_bytes))
    return SwapSpace(FileRoom(folder, num_slots, page_bytes))


def _digest(name: bytes, content: memoryview) -> bytes:
    state = xxhash.xxh3_128(name)
    state.update(content)
    return state.digest()
