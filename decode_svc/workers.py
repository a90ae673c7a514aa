"""The prefill workers this decode service knows, kept fresh in the background.

Redis is a hint: when it is silent the last list stays in use (law 6); a worker that fails a call is
left alone for a while whatever Redis says.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import grpc

from decode_svc.choose import choose_prefill
from engine.serving.channels import open_channel
from kvstore.index import IndexUnavailable, PageIndex, WorkerRecord

REFRESH_S = 1.0
AVOID_S = 5.0
log = logging.getLogger(__name__)


class PrefillWorkers:
    """Chooses workers and keeps one channel per endpoint."""

    def __init__(
        self, index: PageIndex, fingerprint: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._index = index
        self._fingerprint = fingerprint
        self._clock = clock
        self._known: list[WorkerRecord] = []
        self._avoid: dict[str, float] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}

    def choose(self) -> WorkerRecord | None:
        now = self._clock()
        self._avoid = {boot: until for boot, until in self._avoid.items() if until > now}
        return choose_prefill(self._known, self._fingerprint, self._avoid)

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
            self._known = await self._index.workers("prefill")
        except IndexUnavailable as error:
            log.debug("worker list not refreshed: %s", error)
        await self._close_unused()

    async def keep_fresh(self) -> None:
        """Refreshes until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(REFRESH_S)

    async def close(self) -> None:
        self._known = []
        await self._close_unused()

    async def _close_unused(self) -> None:
        endpoints = {worker.endpoint for worker in self._known}
        for endpoint in [each for each in self._channels if each not in endpoints]:
            await self._channels.pop(endpoint).close()
