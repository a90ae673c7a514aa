"""What was freed below something that is still held leaves the process when it is given back."""

from __future__ import annotations

import os
from pathlib import Path

from engine.model import freed_memory


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_memory_freed_in_the_middle_of_the_heap_is_given_back() -> None:
    size, count = 100_000, 600  # small enough for the heap, large enough to see
    blocks = [bytes([1]) * size for _ in range(count)]
    held = blocks[::20]
    del blocks
    before = resident_bytes()
    freed_memory.give_back()
    assert before - resident_bytes() > size * count // 2
    assert all(block[-1] == 1 for block in held)
