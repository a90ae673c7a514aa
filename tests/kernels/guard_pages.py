"""Memory beside pages that nobody may touch: one byte too far, and the process ends by SIGSEGV."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch

PAGE = mmap.PAGESIZE
PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Memory:
    """Where arrays stand. ``allocate(num_bytes)`` gives ``[num_bytes]`` uint8."""

    allocate: Callable[[int], torch.Tensor]

    def room(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An array to be written. What it holds before differs from memory to memory."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        return self.allocate(num_bytes).view(dtype).view(shape)

    def put(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of ``values``, which are at least one."""
        return self.room(*values.shape, dtype=values.dtype).copy_(values)


def _between_guards(num_bytes: int, at_end: bool) -> torch.Tensor:
    inner = -(-num_bytes // PAGE) * PAGE
    mapping = mmap.mmap(-1, PAGE + inner + PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    for guard in (address, address + PAGE + inner):
        if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = PAGE + (inner - num_bytes if at_end else 0)
    return torch.frombuffer(mapping, dtype=torch.uint8, count=num_bytes, offset=start)


ORDINARY = Memory(lambda num_bytes: torch.full((num_bytes,), 0xFF, dtype=torch.uint8))
BEFORE_GUARD = Memory(lambda num_bytes: _between_guards(num_bytes, at_end=True))
AFTER_GUARD = Memory(lambda num_bytes: _between_guards(num_bytes, at_end=False))


def overstated(row: torch.Tensor, before: int = 0, after: int = 0) -> torch.Tensor:
    """``row`` [n] fp32, seen as [before + n + after]: it claims memory that is not its own."""
    claimed = ctypes.c_float * (before + len(row) + after)
    return torch.frombuffer(
        claimed.from_address(row.data_ptr() - before * row.itemsize), dtype=row.dtype
    )
