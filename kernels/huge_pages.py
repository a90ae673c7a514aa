"""Memory in huge pages: what is read from end to end looks up few addresses."""

from __future__ import annotations

import mmap
from contextlib import suppress


def ask_for_huge_pages(mapping: mmap.mmap) -> None:
    """Lets the system back ``mapping`` with huge pages, where it can and is allowed to."""
    with suppress(OSError):  # not every kernel has them
        mapping.madvise(mmap.MADV_HUGEPAGE)


def private_memory(num_bytes: int) -> mmap.mmap:
    """Zeroed memory of this process, in huge pages if possible."""
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ask_for_huge_pages(mapping)
    return mapping
