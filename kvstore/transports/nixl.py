"""``nixl``: the receiver reads the owner's pool through NIXL (UCX: shared memory, TCP, RDMA).

Bytes are read into a staging buffer of this transport and copied from there, so a read that nobody
waits for any more cannot write into pages that belong to others by then. After the bytes the
generations of their slots are read, as with shared memory: unchanged ones mean that the bytes are
of the content that was announced.

NIXL's calls block and one agent is for one thread: all of them run in a thread of their own.
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from kernels.layout import PageLayout
from kvstore.landing import LandingError
from kvstore.memory import LayerGroups, PageMemory
from kvstore.page import PageFrame
from kvstore.transports import TransportUnavailable

STAGING_BYTES = 4 << 20
READ_TIMEOUT_S = 5.0
_POLLS_BEFORE_SLEEP = 200
_POLL_S = 0.0001
_REACH = b"nixl 1"
_ADDRESS = struct.Struct("<QQQQ")  # addresses of pages and generations, number and bytes of pages
_DRAM = "DRAM"
T = TypeVar("T")


def load() -> Any:
    """The library. Raises TransportUnavailable with the reason."""
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    try:
        import nixl
    except (ImportError, OSError, RuntimeError) as error:
        raise TransportUnavailable(f"NIXL cannot be loaded: {error}") from None
    return nixl


async def start(memory: PageMemory, boot_id: bytes) -> NixlTransport:
    """Raises TransportUnavailable."""
    executor = ThreadPoolExecutor(1, "nixl")
    try:
        loop = asyncio.get_running_loop()
        agent = await loop.run_in_executor(executor, _Agent, memory, boot_id.hex())
    except BaseException:
        executor.shutdown(wait=False)
        raise
    return NixlTransport(agent, executor)


class NixlTransport:
    """Both ends of one worker."""

    name = "nixl"
    carries_payload = False
    reach = _REACH

    def __init__(self, agent: _Agent, executor: ThreadPoolExecutor) -> None:
        self._agent = agent
        self._executor = executor
        self._staging = asyncio.Lock()
        self.address = agent.address

    def reached_from(self, reach: bytes) -> bool:
        return reach == _REACH

    async def connect(self, address: bytes, owner: bytes, layout: PageLayout) -> RemotePool:
        pool = await self.run(lambda: self._agent.connect(address, owner.hex(), layout))
        return RemotePool(self, pool, LayerGroups(layout))

    async def read(
        self, pool: _Pool, reads: Sequence[_Read], targets: Sequence[memoryview]
    ) -> None:
        """Reads of at most the staging buffer's size together. Raises LandingError.

        If this is cancelled, the thread still ends its read into the staging buffer before it
        begins another one.
        """
        async with self._staging:
            staged = await self.run(lambda: self._agent.read(pool, reads))
            for part, target in zip(staged, targets, strict=True):
                target[:] = part

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def close(self) -> None:
        await self.run(self._agent.close)
        self._executor.shutdown(wait=False)


class RemotePool:
    """An owner's pool, read through NIXL; a ``PageSource``."""

    def __init__(self, transport: NixlTransport, pool: _Pool, groups: LayerGroups) -> None:
        self._transport = transport
        self._pool = pool
        self._groups = groups
        self.lost = False

    async def read(self, frames: Sequence[PageFrame], targets: Sequence[memoryview]) -> None:
        if self.lost:
            raise LandingError("transport", "the owner's pool is gone")
        reads = [self._read_of(frame) for frame in frames]
        for target, read in zip(targets, reads, strict=True):
            if len(target) != read.size:
                raise LandingError("size", f"{read.size} bytes of a page, not {len(target)}")
        try:
            for part in _parts([read.size for read in reads]):
                await self._transport.read(self._pool, reads[part], targets[part])
        except LandingError as error:
            self.lost = error.reason == "transport"
            raise

    def close(self) -> None:
        self.lost = True

    def _read_of(self, frame: PageFrame) -> _Read:
        slot = frame.identity.reference.slot
        if slot >= self._pool.num_pages:
            raise LandingError("slot", f"slot {slot} of a pool of {self._pool.num_pages}")
        span = self._groups.span(frame.layer_group)
        return _Read(slot, frame.identity.reference.generation, span.start, span.stop - span.start)


@dataclass(frozen=True, slots=True)
class _Pool:
    """Where an owner's pool lies in its process, and the name of its agent."""

    agent: str
    pages: int
    generations: int
    num_pages: int
    page_bytes: int


@dataclass(frozen=True, slots=True)
class _Read:
    slot: int
    generation: int
    start: int
    size: int


class _Agent:
    """NIXL as far as it is used here. All methods run in one thread."""

    def __init__(self, memory: PageMemory, name: str) -> None:
        nixl = load()
        self._registered: list[Any] = []
        self._left_behind: list[Any] = []
        pages, generations = memory.bytes.numpy(), memory.generations
        try:
            self._agent = nixl.nixl_agent(name, nixl.nixl_agent_config(backends=["UCX"]))
            for array in (pages, generations):
                self._register(array)
            self._staging = self._new_staging()
            metadata: bytes = self._agent.get_agent_metadata()
        except Exception as error:
            raise TransportUnavailable(f"NIXL cannot start: {error}") from None
        self.address = metadata + _ADDRESS.pack(
            pages.ctypes.data, generations.ctypes.data, *pages.shape
        )

    def connect(self, address: bytes, owner: str, layout: PageLayout) -> _Pool:
        """Raises TransportUnavailable."""
        try:
            pool = _Pool(owner, *_ADDRESS.unpack(address[-_ADDRESS.size :]))
            name = self._agent.add_remote_agent(address[: -_ADDRESS.size])
        except Exception as error:
            raise TransportUnavailable(f"nixl: no way to the pool: {error}") from None
        if name not in (owner, owner.encode()):
            raise TransportUnavailable("nixl: another worker answered")
        if pool.page_bytes != layout.page_bytes:
            raise TransportUnavailable(f"nixl: pages of {pool.page_bytes} bytes")
        return pool

    def read(self, pool: _Pool, reads: Sequence[_Read]) -> list[memoryview]:
        """The bytes read, as parts of the staging buffer. Raises LandingError."""
        pages = [
            (pool.pages + read.slot * pool.page_bytes + read.start, read.size) for read in reads
        ]
        staged = list(self._transfer(pool, pages))
        ends = np.cumsum([size for _, size in pages])
        numbers = self._transfer(
            pool, [(pool.generations + 8 * read.slot, 8) for read in reads], int(ends[-1])
        )
        for read, number in zip(reads, numbers, strict=True):
            if int.from_bytes(number, "little") != read.generation:
                raise LandingError("generation", "the page moved on while it was read")
        return staged

    def _transfer(
        self, pool: _Pool, places: Sequence[tuple[int, int]], first: int = 0
    ) -> Iterator[memoryview]:
        """Reads the places of a pool into the staging buffer, from byte ``first`` on."""
        starts = [first + int(n) for n in np.cumsum([0, *(size for _, size in places)])]
        base = self._staging.ctypes.data
        local = [(base + start, size, 0) for start, (_, size) in zip(starts, places, strict=False)]
        agent = self._agent
        try:
            handle = agent.initialize_xfer(
                "READ",
                agent.get_xfer_descs(local, _DRAM),
                agent.get_xfer_descs([(*place, 0) for place in places], _DRAM),
                pool.agent,
            )
            try:
                _wait(agent, handle)
            finally:
                agent.release_xfer_handle(handle)
        except Exception as error:
            # It may go on writing: leave the buffer to it, for as long as this process lives.
            self._left_behind.append(self._staging)
            self._staging = self._new_staging()
            raise LandingError("transport", f"a read failed: {error}") from None
        view = self._staging.data
        return (view[start:end] for start, end in pairwise(starts))

    def close(self) -> None:
        for each in self._registered:
            self._agent.deregister_memory(each)

    def _new_staging(self) -> Any:
        staging = np.empty(STAGING_BYTES, dtype=np.uint8)
        self._register(staging)
        return staging

    def _register(self, array: Any) -> None:
        place = (array.ctypes.data, array.nbytes, 0, "")
        self._registered.append(self._agent.register_memory([place], _DRAM))


def _wait(agent: Any, handle: Any) -> None:
    """Returns when the transfer is done. Raises RuntimeError or TimeoutError."""
    state = agent.transfer(handle)
    give_up = time.monotonic() + READ_TIMEOUT_S
    polls = 0
    while state == "PROC":
        if time.monotonic() > give_up:
            raise TimeoutError(f"nothing for {READ_TIMEOUT_S} s")
        polls += 1
        if polls > _POLLS_BEFORE_SLEEP:
            time.sleep(_POLL_S)
        state = agent.check_xfer_state(handle)
    if state != "DONE":
        raise RuntimeError(f"the transfer ended as {state}")


def _parts(sizes: Sequence[int]) -> Iterator[slice]:
    """Runs of reads that, with their generations, fit into the staging buffer together."""
    start, filled = 0, 0
    for index, size in enumerate(sizes):
        if filled + size + 8 > STAGING_BYTES and index > start:
            yield slice(start, index)
            start, filled = index, 0
        filled += size + 8
    yield slice(start, len(sizes))
