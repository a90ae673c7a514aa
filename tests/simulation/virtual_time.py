"""An event loop whose clock jumps: where nothing is left to do now, it is the next timer's time.

Inside ``virtual_time`` the process's own clocks and sources of randomness belong to the simulation
too, so that services which ask for the time or for random bytes need no change. Threads would bring
back chance: ``asyncio.to_thread`` runs its function at once, in place.
"""

from __future__ import annotations

import asyncio
import gc
import random
import secrets
import selectors
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from tests.simulation.process import current_clock

MAX_TURNS = 200_000
WALL_S = 1_700_000_000.0
EPOCH_S = 1_000.0  # a clock that starts at 0 hides mistakes


class _NoSelector(selectors.BaseSelector):
    """Waits by moving the clock on; knows no files."""

    def __init__(self, advance: Callable[[float | None], None]) -> None:
        self._advance = advance

    def select(self, timeout: float | None = None) -> list[Any]:
        self._advance(timeout)
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> Any: ...

    def unregister(self, fileobj: Any) -> Any: ...

    def get_map(self) -> Mapping[Any, Any]:
        return {}


class VirtualLoop(asyncio.SelectorEventLoop):
    """Deterministic as long as everything in it is. ``now`` is the time in seconds."""

    def __init__(self) -> None:
        self.now = EPOCH_S
        self.num_turns = 0
        super().__init__(_NoSelector(self._advance))

    def time(self) -> float:
        """What the monotonic clock of the running process shows."""
        return current_clock().local(self.now)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:
        """``when`` is of the running process's clock."""
        when = max(current_clock().of_all(when), self.now)
        return super().call_at(when, callback, *args, context=context)

    def at(self, when: float, callback: Any, *args: Any) -> asyncio.TimerHandle:
        """``when`` is the simulation's time, whosever code asks."""
        return super().call_at(when, callback, *args)

    def later(self, seconds: float, callback: Any, *args: Any) -> asyncio.TimerHandle:
        return self.at(self.now + seconds, callback, *args)

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Any, function: Any, *args: Any) -> Any:
        done: asyncio.Future[Any] = self.create_future()
        try:
            done.set_result(function(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    def _advance(self, timeout: float | None) -> None:
        self.num_turns += 1
        if self.num_turns > MAX_TURNS:
            self.num_turns = 0
            raise Stuck(f"{MAX_TURNS} turns, and still something to do")
        if timeout is None:
            raise Stuck("nothing is left to happen, and the simulation has not ended")
        if timeout > 0:
            # Exactly the timer's own time: a sum of differences would miss it by a rounding error.
            self.now = max(self.now, self._scheduled[0]._when)  # type: ignore[attr-defined]


class Stuck(Exception):
    """Everybody waits for somebody else, or somebody is never done."""


@contextmanager
def virtual_time(loop: VirtualLoop, seed: int) -> Iterator[None]:
    """Gives clocks and randomness of this process to the simulation for the block."""
    chance = random.Random(seed)
    state = random.getstate()
    random.seed(seed)
    gc.disable()

    def wall() -> float:
        return WALL_S + loop.time() + current_clock().wall_shift_s

    try:
        with (
            patch.object(time, "monotonic", loop.time),
            patch.object(time, "monotonic_ns", lambda: round(loop.time() * 1e9)),
            patch.object(time, "time", wall),
            patch.object(time, "time_ns", lambda: round(wall() * 1e9)),
            patch.object(secrets, "token_bytes", chance.randbytes),
            patch.object(secrets, "token_hex", lambda size: chance.randbytes(size).hex()),
            patch.object(secrets, "randbits", chance.getrandbits),
        ):
            yield
    finally:
        gc.enable()
        random.setstate(state)


@contextmanager
def running(loop: VirtualLoop) -> Iterator[None]:
    """The current event loop for the block, closed after it."""
    asyncio.set_event_loop(loop)
    try:
        yield
    finally:
        asyncio.set_event_loop(None)
        loop.close()
