"""The prefill workers this decode service knows, kept fresh in the background.

Redis is a hint (law 6). When it is silent the last list stays in use. When it was restarted empty,
workers it does not name yet are kept until they had time to register again. A worker that fails a
call is left alone for a while whatever Redis says.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from decode_svc.choose import choose_prefill
from engine.serving.channels import open_channel
from kvstore.index import PageIndex, PageIndexError, WorkerRecord

REFRESH_S = 1.0
KEEP_S = 10.0
AVOID_S = 5.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Known:
    """A worker as last listed, and until when it is believed without being listed again."""

    record: WorkerRecord
    until: float


class PrefillWorkers:
    """Chooses workers and keeps one channel per endpoint."""

    def __init__(
        self, index: PageIndex, fingerprint: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._index = index
        self._fingerprint = fingerprint
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._avoid: dict[str, float] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}

    def choose(self) -> WorkerRecord | None:
        now = self._clock()
        self._avoid = {boot: until for boot, until in self._avoid.items() if until > now}
        records = [known.record for known in self._known.values()]
        return choose_prefill(records, self._fingerprint, self._avoid)

    def failed(self, worker: WorkerRecord) -> None:
        """The worker broke a handover: leave it alone for a while."""
        self._avoid[worker.boot_id] = self._clock() + AVOID_S

    def channel(self, worker: WorkerRecord) -> grpc.aio.Channel:
        if worker.endpoint not in self._channels:
            self._channels[worker.endpoint] = open_channel(worker.endpoint, "pages")
        return self._channels[worker.endpoint]

    async def refresh(self) -> None:
        """Reads the list once; a failure keeps what is known."""
        try:
            listed = await self._index.workers("prefill")
        except PageIndexError as error:
            log.debug("worker list not refreshed: %s", error)
            return
        now = self._clock()
        fresh = {known.record.boot_id: known for known in self._known.values() if known.until > now}
        fresh |= {record.boot_id: _Known(record, now + KEEP_S) for record in listed}
        self._known = fresh
        await self._close_unused()

    async def keep_fresh(self) -> None:
        """Refreshes until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(REFRESH_S)

    async def close(self) -> None:
        self._known = {}
        await self._close_unused()

    async def _close_unused(self) -> None:
        endpoints = {known.record.endpoint for known in self._known.values()}
        for endpoint in [each for each in self._channels if each not in endpoints]:
            await self._channels.pop(endpoint).close()
