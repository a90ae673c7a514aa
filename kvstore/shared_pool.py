"""A pool's memory as an anonymous file that other processes of the same user can map to read.

The file has no name: it is gone when the last process that has it open or mapped is, however that
one ends. It is sealed: nobody can shrink it under a reader (which would be a bus error there), and
nobody but the owner, through the mapping it made before, can write to it. Its pages exist from the
start, so a lack of memory shows here as an error and not later as a bus error.

::

    [generation of each slot: uint64][to a whole 4096 bytes][slot 0][slot 1] ...
"""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np

PAGE_ALIGNMENT = 4096
_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; the module fcntl does not name it
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE


class SharedMemoryUnavailable(Exception):
    """This system cannot give, or this user cannot map, the shared memory asked for."""


class SharedPool:
    """Generations and pages in one mapping; ``pages`` is writable at the owner only."""

    def __init__(self, file: int, num_pages: int, page_bytes: int, access: int) -> None:
        start = _pages_start(num_pages)
        self.file = file
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self._mapping = mmap.mmap(file, start + num_pages * page_bytes, access=access)
        self.generations = np.frombuffer(self._mapping, np.uint64, num_pages)
        pages = np.frombuffer(self._mapping, np.uint8, num_pages * page_bytes, start)
        self.pages = pages.reshape(num_pages, page_bytes)

    @classmethod
    def create(cls, num_pages: int, page_bytes: int) -> SharedPool:
        """A new pool of zeros, owned by this process. Raises SharedMemoryUnavailable."""
        size = _pages_start(num_pages) + num_pages * page_bytes
        file = -1
        try:
            file = os.memfd_create("quire-pages", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.posix_fallocate(file, 0, size)
            pool = cls(file, num_pages, page_bytes, mmap.ACCESS_WRITE)
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            if file >= 0:
                os.close(file)
            raise SharedMemoryUnavailable(f"{size} bytes of it: {error.strerror}") from None
        return pool

    @classmethod
    def attach(cls, file: int, num_pages: int, page_bytes: int) -> SharedPool:
        """Another process's pool, to read; ``file`` may be closed afterwards.

        Raises SharedMemoryUnavailable unless the file has the size stated and keeps it.
        """
        size = _pages_start(num_pages) + num_pages * page_bytes
        try:
            if fcntl.fcntl(file, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise SharedMemoryUnavailable("the pool is not sealed")
            if os.fstat(file).st_size != size:
                raise SharedMemoryUnavailable(f"the pool does not have {size} bytes")
            return cls(file, num_pages, page_bytes, mmap.ACCESS_READ)
        except OSError as error:
            raise SharedMemoryUnavailable(f"the pool cannot be mapped: {error}") from None

    def close(self) -> None:
        """Closes the file; the mapping stays as long as anything refers to its arrays."""
        if self.file >= 0:
            os.close(self.file)
        self.file = -1


def _pages_start(num_pages: int) -> int:
    return -(-8 * num_pages // PAGE_ALIGNMENT) * PAGE_ALIGNMENT
