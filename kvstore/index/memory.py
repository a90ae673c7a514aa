"""The page index of one process: for tests and for services that share no server."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvstore.index import (
    HandoverRecord,
    HandoverState,
    IdentityConflict,
    IndexUnavailable,
    PageEntry,
    StaleTransition,
    WorkerRecord,
    WorkerRole,
)
from kvstore.index.records import check_end, check_hex128, check_offer, check_pages, check_ttl

SWEEP_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class _Worker:
    record: WorkerRecord
    expires: float


@dataclass(frozen=True, slots=True)
class _Handover:
    record: HandoverRecord
    deadline: float
    expires: float


class MemoryPageIndex:
    """``clock`` returns seconds and never goes back. One event loop uses it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._workers: dict[str, _Worker] = {}
        self._holders: dict[tuple[str, bytes], dict[str, float]] = {}
        self._handovers: dict[str, _Handover] = {}
        self._next_sweep = clock() + SWEEP_INTERVAL_S
        self._closed = False

    async def register(self, record: WorkerRecord, ttl_s: float) -> None:
        check_ttl(ttl_s)
        now = self._now()
        known = self._workers.get(record.boot_id)
        if known is None or known.expires <= now:
            self._forget_worker_at(record.endpoint)
        elif known.record.endpoint != record.endpoint:
            raise IdentityConflict(record)
        self._workers[record.boot_id] = _Worker(record, now + ttl_s)

    async def unregister(self, boot_id: str) -> None:
        self._now()
        self._workers.pop(boot_id, None)

    async def workers(self, role: WorkerRole | None = None) -> list[WorkerRecord]:
        now = self._now()
        live = [each.record for each in self._workers.values() if each.expires > now]
        fit = (record for record in live if role in (None, record.role))
        return sorted(fit, key=lambda record: record.boot_id)

    async def publish(
        self, fingerprint: str, prefix_hashes: Sequence[bytes], boot_id: str, ttl_s: float
    ) -> None:
        check_pages(fingerprint, prefix_hashes)
        check_hex128("boot_id", boot_id)
        check_ttl(ttl_s)
        expires = self._now() + ttl_s
        for prefix_hash in prefix_hashes:
            self._holders.setdefault((fingerprint, prefix_hash), {})[boot_id] = expires

    async def lookup(
        self, fingerprint: str, prefix_hashes: Sequence[bytes]
    ) -> list[frozenset[str]]:
        check_pages(fingerprint, prefix_hashes)
        now = self._now()
        found = []
        for prefix_hash in prefix_hashes:
            holders = self._holders.get((fingerprint, prefix_hash), {})
            live = frozenset(boot for boot, expires in holders.items() if expires > now)
            if not live:
                break
            found.append(live)
        return found

    async def withdraw(
        self, fingerprint: str, prefix_hashes: Sequence[bytes], boot_id: str
    ) -> None:
        check_pages(fingerprint, prefix_hashes)
        self._now()
        for prefix_hash in prefix_hashes:
            self._holders.get((fingerprint, prefix_hash), {}).pop(boot_id, None)

    async def entries(self) -> list[PageEntry]:
        self._now()
        return [
            PageEntry(fingerprint, prefix_hash, found[0])
            for fingerprint, prefix_hash in list(self._holders)
            if (found := await self.lookup(fingerprint, [prefix_hash]))
        ]

    async def offer_handover(self, record: HandoverRecord, ttl_s: float) -> None:
        check_offer(record)
        check_ttl(ttl_s)
        now = self._now()
        known = self._live_handover(record.request_id, now)
        if known and known.record.attempt >= record.attempt:
            if not _same_offer(known.record, record):
                raise StaleTransition(record.request_id, record.attempt, record.state)
            return
        kept = _Handover(record, now + record.remaining_s, now + ttl_s)
        self._handovers[record.request_id] = kept

    async def move_handover(self, request_id: str, attempt: int, to_state: HandoverState) -> None:
        check_end(to_state)
        known = self._live_handover(request_id, self._now())
        if (
            known is None
            or known.record.attempt != attempt
            or known.record.state not in (HandoverState.OFFERED, to_state)
        ):
            raise StaleTransition(request_id, attempt, to_state)
        moved = replace(known, record=replace(known.record, state=to_state))
        self._handovers[request_id] = moved

    async def handover(self, request_id: str) -> HandoverRecord | None:
        now = self._now()
        known = self._live_handover(request_id, now)
        if known is None:
            return None
        return replace(known.record, remaining_s=max(0.0, known.deadline - now))

    async def close(self) -> None:
        self._closed = True

    def _forget_worker_at(self, endpoint: str) -> None:
        others = {k: v for k, v in self._workers.items() if v.record.endpoint != endpoint}
        self._workers = others

    def _live_handover(self, request_id: str, now: float) -> _Handover | None:
        known = self._handovers.get(request_id)
        return known if known and known.expires > now else None

    def _now(self) -> float:
        """The time of the present call, which is also when what has expired is let go."""
        if self._closed:
            raise IndexUnavailable("the page index is closed")
        now = self._clock()
        if now >= self._next_sweep:
            self._sweep(now)
            self._next_sweep = now + SWEEP_INTERVAL_S
        return now

    def _sweep(self, now: float) -> None:
        self._workers = {k: v for k, v in self._workers.items() if v.expires > now}
        self._handovers = {k: v for k, v in self._handovers.items() if v.expires > now}
        self._holders = {
            page: live
            for page, holders in self._holders.items()
            if (live := {boot: expires for boot, expires in holders.items() if expires > now})
        }


def _same_offer(known: HandoverRecord, offered: HandoverRecord) -> bool:
    def offer(record: HandoverRecord) -> tuple[int, str, str, int]:
        return record.attempt, record.prefill_boot_id, record.decode_boot_id, record.num_pages

    return offer(known) == offer(offered)
