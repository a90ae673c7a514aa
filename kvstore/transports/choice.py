"""The transports of one worker, and which one a pair of workers uses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from kernels.layout import PageLayout
from kvstore.memory import PageMemory
from kvstore.shared_pool import SharedMemoryUnavailable, SharedPool
from kvstore.transports import (
    DEFAULT,
    PageSource,
    StreamTransport,
    Transport,
    TransportAddress,
    TransportUnavailable,
)
from kvstore.transports.shm import SharedMemoryTransport

AUTO = "auto"
NAMES = ("shm", "nixl", "grpc")
log = logging.getLogger(__name__)


def problem_of(name: str) -> str | None:
    """Why a worker on this machine cannot offer the transport; None if it can."""
    try:
        if name == "shm":
            SharedPool.create(1, 1).close()
        if name == "nixl":
            from kvstore.transports import nixl

            nixl.load()
    except (SharedMemoryUnavailable, TransportUnavailable) as error:
        return str(error)
    return None


def open_memory(layout: PageLayout, num_pages: int, names: Sequence[str]) -> PageMemory:
    """A pool's memory, shared if ``names`` say so; under ``auto``, if the system gives it.

    Raises TransportUnavailable.
    """
    if "shm" not in names and AUTO not in names:
        return PageMemory(layout, num_pages)
    try:
        return PageMemory(layout, num_pages, SharedPool.create(num_pages, layout.page_bytes))
    except SharedMemoryUnavailable as error:
        if "shm" in names:
            raise TransportUnavailable(f"shm: no shared memory for the pool: {error}") from None
        log.warning("pages are not offered through shared memory: %s", error)
        return PageMemory(layout, num_pages)


class Transports:
    """What one worker offers, best first. Belongs to one event loop."""

    def __init__(self) -> None:
        self._by_name: dict[str, Transport] = {}
        self._sources: dict[tuple[str, bytes], PageSource] = {}
        self._failed: set[tuple[str, bytes]] = set()
        self._connecting: dict[tuple[str, bytes], asyncio.Lock] = {}

    @classmethod
    async def start(cls, names: Sequence[str], memory: PageMemory, boot_id: bytes) -> Transports:
        """``names`` as ``open_memory`` got them. Raises TransportUnavailable."""
        started = cls()
        try:
            for name in names:
                for meant in _meant(name, memory):
                    if meant not in started._by_name:
                        started._by_name[meant] = await _started(meant, memory, boot_id)
        except BaseException:
            await started.close()
            raise
        return started

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def readable(self, owner: bytes) -> list[TransportAddress]:
        """How this worker can read pages of ``owner``, best first, for a request to it."""
        return [
            TransportAddress(transport.name, transport.reach)
            for transport in self._by_name.values()
            if (transport.name, owner) not in self._failed
        ]

    def choose(self, readable: Sequence[TransportAddress]) -> TransportAddress:
        """The first of a receiver's ways that leads to this worker's pages, with their address.

        Raises TransportUnavailable if none does.
        """
        for wanted in readable or [TransportAddress(DEFAULT)]:
            transport = self._by_name.get(wanted.name)
            if transport is not None and transport.reached_from(wanted.address):
                return TransportAddress(transport.name, transport.address)
        theirs = ", ".join(each.name for each in readable)
        raise TransportUnavailable(f"the receiver reads by {theirs}, here is {self._offered}")

    def carries_payload(self, chosen: TransportAddress) -> bool:
        """Whether announcements must contain the bytes."""
        return self._by_name[chosen.name].carries_payload

    async def source(
        self, chosen: TransportAddress, owner: bytes, layout: PageLayout
    ) -> PageSource:
        """The way to an owner's pages that it chose. Raises TransportUnavailable.

        A way that failed is not offered to this owner again.
        """
        key = chosen.name, owner
        transport = self._by_name.get(chosen.name)
        if transport is None:
            raise TransportUnavailable(f"{chosen.name} was not offered, only {self._offered}")
        async with self._connecting.setdefault(key, asyncio.Lock()):
            known = self._sources.get(key)
            if known is not None and not known.lost:
                return known
            try:
                source = await transport.connect(chosen.address, owner, layout)
            except TransportUnavailable:
                self._failed.add(key)
                raise
            self._sources[key] = source
        log.info("pages of worker %s come by %s", owner.hex(), chosen.name)
        return source

    def forget(self, owner: bytes) -> None:
        """The owner is gone: gives up what leads to its pages."""
        for key in [(name, owner) for name in NAMES]:
            source = self._sources.pop(key, None)
            if source is not None:
                source.close()
            self._failed.discard(key)
            self._connecting.pop(key, None)

    async def close(self) -> None:
        self._sources.clear()
        for transport in self._by_name.values():
            await transport.close()

    @property
    def _offered(self) -> str:
        return ", ".join(self._by_name)


def _meant(name: str, memory: PageMemory) -> list[str]:
    if name != AUTO:
        return [name]
    return ["shm", DEFAULT] if memory.shared is not None else [DEFAULT]


async def _started(name: str, memory: PageMemory, boot_id: bytes) -> Transport:
    if name == "shm":
        return SharedMemoryTransport(memory, boot_id)
    if name == "nixl":
        from kvstore.transports import nixl

        return await nixl.start(memory, boot_id)
    return StreamTransport()
