"""Memory that was freed, back to the system: packing weights frees much in the midst of the heap.

glibc gives back by itself what is free at the top of its heap only.
"""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Returns every free page of the heap. Does nothing where the C library has no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
