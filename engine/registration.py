"""A worker's entry in the page index: heartbeats, and the names of the pages it keeps.

Pages are told as they are sealed, several at a time, so that a prefix can be pulled right after it
was computed. Every heartbeat carries the full record, and all page names are told again now and
then, so an index that was restarted empty is complete again without anybody noticing (law 6).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from engine.core import EngineCore
from engine.mailbox import AsyncEngine
from kvstore.index import PageIndex, PageIndexError, WorkerRecord

WORKER_TTL_S = 10.0
HEARTBEAT_S = 2.0
PAGE_TTL_S = 60.0
NEWS_EVERY_S = 0.05  # at most
ALL_PAGES_EVERY = 10  # heartbeats
log = logging.getLogger(__name__)


class Registration:
    """Keeps one worker registered while it lives."""

    def __init__(
        self,
        index: PageIndex,
        engine: AsyncEngine,
        record: Callable[[], Awaitable[WorkerRecord]],
    ) -> None:
        self._index = index
        self._engine = engine
        self._record = record
        self._telling = asyncio.Lock()  # what was published and withdrawn is told in order
        self.reachable = False

    async def run(self) -> None:
        """Heartbeats until cancelled."""
        beat = 0
        while True:
            await self.beat(all_pages=beat % ALL_PAGES_EVERY == 0)
            beat += 1
            await asyncio.sleep(HEARTBEAT_S * random.uniform(0.8, 1.2))

    async def tell_news(self) -> None:
        """Tells of pages soon after they were sealed or evicted, until cancelled."""
        while True:
            await self._engine.cache_changed.wait()
            self._engine.cache_changed.clear()
            if self.reachable:  # otherwise the next heartbeat that is heard tells of all pages
                await self._heard(self._tell_pages())
            await asyncio.sleep(NEWS_EVERY_S)

    async def beat(self, all_pages: bool = False) -> None:
        """Registers once. A failure is noted and changes nothing else."""
        record = await self._record()
        if not await self._heard(self._register(record, all_pages or not self.reachable)):
            return
        if not self.reachable:
            log.info("registered boot_id=%s role=%s", record.boot_id, record.role)
        self.reachable = True

    async def leave(self) -> None:
        """Takes the worker out of the index."""
        try:
            await self._index.unregister(self._engine.core.boot_id.hex())
        except PageIndexError as error:
            log.info("not unregistered, the entry will expire: %s", error)

    async def _heard(self, told: Awaitable[None]) -> bool:
        """Whether the index took it; if not it is lost until a heartbeat is heard."""
        try:
            await told
        except PageIndexError as error:
            if self.reachable:
                log.warning("page index lost: %s", error)
            self.reachable = False
            return False
        return True

    async def _register(self, record: WorkerRecord, all_pages: bool) -> None:
        await self._index.register(record, WORKER_TTL_S)
        await self._tell_pages(all_pages)

    async def _tell_pages(self, all_pages: bool = False) -> None:
        def changes(core: EngineCore) -> tuple[list[bytes], list[bytes]]:
            published, withdrawn = core.pool.take_cache_changes()
            return (core.pool.cached_names() if all_pages else published), withdrawn

        core = self._engine.core
        fingerprint, boot_id = core.fingerprint.digest.hex(), core.boot_id.hex()
        async with self._telling:
            published, withdrawn = await self._engine.call(changes)
            if withdrawn:
                await self._index.withdraw(fingerprint, withdrawn, boot_id)
            if published:
                await self._index.publish(fingerprint, published, boot_id, PAGE_TTL_S)
