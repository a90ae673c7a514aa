"""The workers this decode service knows, kept fresh in the background.

Redis is a hint (law 6). When it is silent the last list stays in use. When it was restarted empty,
workers it does not name yet are kept until they had time to register again; not so a worker whose
endpoint another one has taken: it is dead. A worker that fails a call is left alone for a while
whatever Redis says.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import grpc

from decode_svc.choose import choose_holder, choose_prefill
from decode_svc.peer import Peer
from decode_svc.reader import Reader
from engine.serving.channels import open_channel
from kvstore.index import PageIndex, PageIndexError, WorkerRecord

REFRESH_S = 1.0
LOOK_AGAIN_S = 0.1
KEEP_S = 10.0
AVOID_S = 5.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Known:
    """A worker as last listed, and until when it is believed without being listed again."""

    record: WorkerRecord
    until: float


class KnownWorkers:
    """Chooses workers and keeps one channel to each; ``on_gone`` is told who is not known any more.

    A worker restarted at its old endpoint is another worker with a channel of its own: the old one
    may wait for a long time before it tries to connect again.
    """

    def __init__(
        self,
        index: PageIndex,
        reader: Reader,
        clock: Callable[[], float] = time.monotonic,
        on_gone: Callable[[bytes], None] = lambda boot_id: None,
    ) -> None:
        self._index = index
        self.reader = reader
        self._clock = clock
        self._on_gone = on_gone
        self._known: dict[str, _Known] = {}
        self._looked = -LOOK_AGAIN_S
        self._unreadable = False
        self._avoid: dict[str, float] = {}
        self._sent: Counter[str] = Counter()
        self._peers: dict[str, Peer] = {}

    def choose(
        self, hit_tokens: Mapping[str, int] | None = None, own_numerics: bool = False
    ) -> WorkerRecord | None:
        """The prefill worker that gets a prompt; see ``choose_prefill``. With ``own_numerics`` it
        is none whose pages would be foreign."""
        reader = replace(self.reader, allow_foreign=False) if own_numerics else self.reader
        return choose_prefill(self._records(), reader, self._avoided(), hit_tokens)

    async def holder(self, held_pages: Mapping[str, int]) -> WorkerRecord | None:
        """The worker whose cached pages are read; see ``choose_holder``. Where the index names one
        that is not known yet, after one more look, if the last one was not just now."""
        unknown = held_pages.keys() - self._known.keys()
        if unknown and self._clock() - self._looked >= LOOK_AGAIN_S:
            await self.refresh()
        return choose_holder(self._records(), self.reader, self._avoided(), held_pages)

    async def find(
        self, hit_tokens: Mapping[str, int] | None = None, own_numerics: bool = False
    ) -> WorkerRecord | None:
        """As ``choose``; where it finds nobody, after one more look at who has registered."""
        worker = self.choose(hit_tokens, own_numerics)
        if worker is None:
            await self.refresh()
            worker = self.choose(hit_tokens, own_numerics)
        return worker

    def standing(self) -> str:
        """Every known prefill worker's endpoint and what speaks for or against it, for logs."""
        each = [
            f"{record.endpoint} {self._fit(record)}"
            for record in self._records()
            if record.role == "prefill"
        ]
        return ", ".join(each) or "none known"

    @contextmanager
    def sending(self, worker: WorkerRecord, num_tokens: int) -> Iterator[None]:
        """So many tokens are with the worker while the block runs, whatever it last said."""
        self._sent[worker.boot_id] += num_tokens
        try:
            yield
        finally:
            self._sent[worker.boot_id] -= num_tokens
            self._sent += Counter()

    def failed(self, worker: WorkerRecord) -> None:
        """The worker broke a transfer of pages: leave it alone for a while."""
        self._avoid[worker.boot_id] = self._clock() + AVOID_S

    async def channel(self, worker: WorkerRecord, timeout_s: float) -> grpc.aio.Channel:
        """A channel to the worker, and to nobody else at its address; see ``Peer.channel``."""
        if worker.boot_id not in self._peers:
            channel = open_channel(worker.endpoint, "pages")
            self._peers[worker.boot_id] = Peer(worker, channel)
        return await self._peers[worker.boot_id].channel(timeout_s)

    async def refresh(self) -> None:
        """Reads the list once; a failure keeps what is known, and time without a list counts
        against nobody."""
        try:
            listed = await self._index.workers()
        except PageIndexError as error:
            log.debug("worker list not refreshed: %s", error)
            self._unreadable = True
            return
        now = self._clock()
        without_list = now - self._looked if self._unreadable else 0.0
        self._looked, self._unreadable = now, False
        taken = {record.endpoint for record in listed}
        kept = {
            boot_id: replace(known, until=known.until + without_list)
            for boot_id, known in self._known.items()
            if known.until + without_list > now and known.record.endpoint not in taken
        }
        self._known = kept | {record.boot_id: _Known(record, now + KEEP_S) for record in listed}
        await self._close_unused()

    async def keep_fresh(self) -> None:
        """Refreshes until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(REFRESH_S)

    async def close(self) -> None:
        self._known = {}
        await self._close_unused()

    def _records(self) -> list[WorkerRecord]:
        """Every known worker with at least the load that it has from here."""
        return [self._with_sent(known.record) for known in self._known.values()]

    def _with_sent(self, record: WorkerRecord) -> WorkerRecord:
        """A list may be a heartbeat old: prompts that come at once must not all go one way."""
        sent = self._sent[record.boot_id]
        if sent <= record.load.queued_tokens:
            return record
        return replace(record, load=replace(record.load, queued_tokens=sent))

    def _avoided(self) -> dict[str, float]:
        now = self._clock()
        self._avoid = {boot: until for boot, until in self._avoid.items() if until > now}
        return self._avoid

    def _fit(self, record: WorkerRecord) -> str:
        if not self.reader.reads(record):
            return f"{self.reader.compatibility(record)} fingerprint"
        return "failed lately" if record.boot_id in self._avoid else record.state

    async def _close_unused(self) -> None:
        for boot_id in self._peers.keys() - self._known.keys():
            self._on_gone(bytes.fromhex(boot_id))
            await self._peers.pop(boot_id).close()
