"""Stops asking a server that does not answer, so that a dead one costs one time-out in a while."""

from __future__ import annotations

from collections.abc import Callable


class Breaker:
    """After a failure, one call per ``cooldown_s`` may try, until a call succeeds."""

    def __init__(self, cooldown_s: float, clock: Callable[[], float]) -> None:
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._retry_at: float | None = None

    def admits(self) -> bool:
        """Whether the caller may try now; if it may after a failure, the next waits again."""
        if self._retry_at is None:
            return True
        if self._clock() < self._retry_at:
            return False
        self._retry_at = self._clock() + self._cooldown_s
        return True

    def failed(self) -> None:
        self._retry_at = self._clock() + self._cooldown_s

    def succeeded(self) -> None:
        self._retry_at = None
