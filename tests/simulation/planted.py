"""Bugs to plant: each takes one guard away, and the simulation must notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from engine.mailbox import AsyncEngine
from engine.serving.leases import Leases
from kvstore import landing, memory
from kvstore.ledger import PageRecord
from kvstore.pool import PagePool


def _held_without(*names: str) -> Any:
    """``PageRecord.held`` that overlooks some holds."""

    def held(record: PageRecord) -> bool:
        holds = {"owners", "leases", "num_readers", "num_writers"} - set(names)
        return any(getattr(record, hold) for hold in holds)

    return patch.object(PageRecord, "held", property(held))


def _no_digest(*_: object) -> bytes:
    return bytes(16)


def _any_attempt(
    handovers: Leases, request_id: bytes, attempt: int, cancel: Callable[[], None]
) -> None:
    handovers._current.pop(request_id, None)
    _begin(handovers, request_id, attempt, cancel)


_begin = Leases.begin

PLANTED: dict[str, list[Any]] = {
    "a page is freed under its reader": [_held_without("num_readers")],
    "a page is freed under its writer": [_held_without("num_writers")],
    "a lease never runs out": [patch.object(Leases, "expire", lambda handovers: 0)],
    "an older attempt is let in": [patch.object(Leases, "begin", _any_attempt)],
    "no digest is compared": [
        patch.object(landing, "group_digest", _no_digest),
        patch.object(memory, "group_digest", _no_digest),
    ],
    "outputs nobody takes keep their holds": [
        patch.object(AsyncEngine, "_give_back", lambda engine, outputs: None)
    ],
    "an abandoned prompt keeps its entry": [
        patch.object(Leases, "abandon", lambda handovers, request_id, attempt: None)
    ],
    "a page in use is taken for idle": [
        patch.object(PagePool, "num_idle_among", lambda pool, slots: 0)
    ],
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        for each in PLANTED[name]:
            stack.enter_context(each)
        yield
