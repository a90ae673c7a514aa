"""Running estimates of what moving and computing pages costs, from what it has cost lately.

Imports neither torch, grpc nor redis.
"""

from __future__ import annotations

DECAY = 0.8
"""What an observation still counts after the next one."""


class Rate:
    """An amount per second: decayed sums, so that large observations count more than small ones."""

    def __init__(self, prior: float) -> None:
        self.value = prior
        self.measured_at: float | None = None
        self._amount = 0.0
        self._seconds = 0.0

    def observe(self, amount: float, seconds: float, now: float) -> None:
        """Something of this amount took so long; nothing, or no time, tells nothing."""
        if amount <= 0 or seconds <= 0:
            return
        self._amount = self._amount * DECAY + amount
        self._seconds = self._seconds * DECAY + seconds
        self.value = self._amount / self._seconds
        self.measured_at = now


class Delay:
    """Seconds that pass whatever the amount."""

    def __init__(self, prior: float) -> None:
        self.value = prior
        self._measured = False

    def observe(self, seconds: float) -> None:
        kept = DECAY if self._measured else 0.0
        self.value = self.value * kept + max(seconds, 0.0) * (1 - kept)
        self._measured = True
