"""Leases on this worker's pages: the current attempt of each request, and what is left to end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import StaleAttempt


def sequence_name(request_id: bytes, attempt: int) -> str:
    """Of the sequence that builds an attempt's pages, and of the lease on them."""
    return f"{request_id.hex()}/{attempt}"


@dataclass(slots=True)
class _Lease:
    attempt: int
    cancel: Callable[[], None]
    expires: float | None = None


def check_attempt(attempt: int, oldest: int) -> None:
    """Raises StaleAttempt for a message of an attempt before ``oldest``."""
    if attempt < oldest:
        raise StaleAttempt(f"attempt {attempt} is stale: {oldest} is the first that may be")


class Leases:
    """One entry per request; a newer attempt ends an older one, an older one has no effect.

    Once granted, pages stay leased until ``release`` or for ``lease_s`` seconds of this process's
    own monotonic clock.
    """

    def __init__(self, lease_s: float, clock: Callable[[], float]) -> None:
        self.lease_s = lease_s
        self._clock = clock
        self._current: dict[bytes, _Lease] = {}
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        return len(self._current)

    @property
    def names(self) -> set[str]:
        """Of the sequences that build or hold the pages of present attempts."""
        return {
            sequence_name(request_id, each.attempt) for request_id, each in self._current.items()
        }

    def begin(self, request_id: bytes, attempt: int, cancel: Callable[[], None]) -> None:
        """Registers an attempt; ``cancel`` frees what it holds. Raises StaleAttempt."""
        known = self._current.get(request_id)
        if known is not None:
            check_attempt(attempt, known.attempt + 1)
            known.cancel()
        self._current[request_id] = _Lease(attempt, cancel)
        self._none.clear()

    def granted(self, request_id: bytes, attempt: int) -> None:
        """Everything is sent, or ready to be read: the lease's time begins."""
        known = self._current.get(request_id)
        if known is not None and known.attempt == attempt:
            known.expires = self._clock() + self.lease_s

    def abandon(self, request_id: bytes, attempt: int) -> None:
        """The attempt ended before its lease began; its pages are freed elsewhere."""
        known = self._current.get(request_id)
        if known is not None and known.attempt == attempt and known.expires is None:
            self._remove(request_id)

    def release(self, request_id: bytes, attempt: int) -> bool:
        """Ends an attempt's hold on its pages. False if nothing was held. Raises StaleAttempt."""
        known = self._current.get(request_id)
        if known is None:
            return False
        check_attempt(attempt, known.attempt)
        self._remove(request_id)
        known.cancel()
        return True

    def holds(self, request_id: bytes, attempt: int) -> bool:
        """Whether the attempt's lease lasts at this moment. Raises StaleAttempt."""
        known = self._current.get(request_id)
        if known is None or known.expires is None:
            return False
        check_attempt(attempt, known.attempt)
        return known.attempt == attempt and known.expires > self._clock()

    def expire(self) -> int:
        """Ends leases whose time is over; returns how many."""
        now = self._clock()
        over = [
            (request_id, known.attempt)
            for request_id, known in self._current.items()
            if known.expires is not None and known.expires <= now
        ]
        for request_id, attempt in over:
            self.release(request_id, attempt)
        return len(over)

    async def wait_ended(self) -> None:
        """Returns when no handover runs and no lease is left; the caller sets the time-out."""
        await self._none.wait()

    async def reap(self) -> None:
        """Expires leases until cancelled."""
        while True:
            await asyncio.sleep(self.lease_s / 4)
            self.expire()

    def _remove(self, request_id: bytes) -> None:
        del self._current[request_id]
        if not self._current:
            self._none.set()
