"""A worker's entry in the page index: heartbeats, and the names of the pages it keeps.

Every heartbeat carries the full record, and all page names are told again now and then, so an index
that was restarted empty is complete again without anybody noticing (law 6).
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
        self.reachable = False

    async def run(self) -> None:
        """Heartbeats until cancelled."""
        beat = 0
        while True:
            await self.beat(all_pages=beat % ALL_PAGES_EVERY == 0)
            beat += 1
            await asyncio.sleep(HEARTBEAT_S * random.uniform(0.8, 1.2))

    async def beat(self, all_pages: bool = False) -> None:
        """Registers once. A failure is noted and changes nothing else."""
        record = await self._record()
        try:
            await self._index.register(record, WORKER_TTL_S)
            await self._tell_pages(record, all_pages or not self.reachable)
        except PageIndexError as error:
            if self.reachable:
                log.warning("page index lost: %s", error)
            self.reachable = False
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

    async def _tell_pages(self, record: WorkerRecord, all_pages: bool) -> None:
        def changes(core: EngineCore) -> tuple[list[bytes], list[bytes]]:
            published, withdrawn = core.pool.take_cache_changes()
            return (core.pool.cached_names() if all_pages else published), withdrawn

        published, withdrawn = await self._engine.call(changes)
        if withdrawn:
            await self._index.withdraw(record.fingerprint, withdrawn, record.boot_id)
        if published:
            await self._index.publish(record.fingerprint, published, record.boot_id, PAGE_TTL_S)
