"""Bugs to plant: each takes one guard away, and the simulation must notice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from engine.errors import EngineFault, HandoverRejected
from engine.mailbox import AsyncEngine
from engine.serving.leases import Leases
from engine.serving.pages import PageServicer, _name
from engine.serving.worker import Worker
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


def _kept_on_the_wall(leases: Leases, lease_s: float, clock: Callable[[], float]) -> None:
    _init(leases, lease_s, time.time)


def _ended_as_broken(worker: Worker) -> None:
    worker.engine.end_all(EngineFault("the service ends"))


def _lease_unchecked(servicer: PageServicer, request: Any) -> Any:
    lent = servicer._lent.get(_name(request))
    if lent is None:
        raise HandoverRejected("never granted")
    return lent


def _end_but_remember(servicer: PageServicer, name: str) -> None:
    lent = servicer._lent.get(name)
    _end(servicer, name)
    if lent is not None:
        servicer._lent[name] = lent


_end = PageServicer._end
_init = Leases.__init__

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
    "a lease protects no page": [_held_without("leases")],
    "a lease that is over is still read from": [
        patch.object(PageServicer, "_lease", _lease_unchecked),
        patch.object(PageServicer, "_end", _end_but_remember),
    ],
    "a drain ends streams as broken": [patch.object(Worker, "hand_back", _ended_as_broken)],
    "leases are kept by the wall clock": [patch.object(Leases, "__init__", _kept_on_the_wall)],
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
