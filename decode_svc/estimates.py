"""Running estimates of what moving and computing pages costs, from what it has cost lately.

Of every other worker apart: one that is slow says nothing about the others. A worker that was not
measured yet is taken for what all of them together are like. Imports neither torch, grpc nor redis.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

DECAY = 0.8
"""What an observation still counts after the next one."""

# Before anything was measured. They favour the prefill service: that is what it is there for.
REMOTE_TOKENS_PER_S = 2_000.0
BYTES_PER_S = 200e6
DELAY_S = 0.005

MAX_PEERS = 256


class Rate:
    """An amount per second: decayed sums, so that large observations count more than small ones.

    Until something is observed it is its ``prior``, a number or another rate.
    """

    def __init__(self, prior: float | Rate) -> None:
        self.measured_at: float | None = None
        self._prior = prior
        self._amount = 0.0
        self._seconds = 0.0

    @property
    def value(self) -> float:
        if not self._seconds:
            return self._prior.value if isinstance(self._prior, Rate) else self._prior
        return self._amount / self._seconds

    def observe(self, amount: float, seconds: float, now: float) -> None:
        """Something of this amount took so long; nothing, or no time, tells nothing."""
        if amount <= 0 or seconds <= 0:
            return
        self._amount = self._amount * DECAY + amount
        self._seconds = self._seconds * DECAY + seconds
        self.measured_at = now


class Delay:
    """Seconds that pass whatever the amount; its ``prior`` until something is observed."""

    def __init__(self, prior: float | Delay) -> None:
        self._prior = prior
        self._seconds: float | None = None

    @property
    def value(self) -> float:
        if self._seconds is None:
            return self._prior.value if isinstance(self._prior, Delay) else self._prior
        return self._seconds

    def observe(self, seconds: float) -> None:
        kept = 0.0 if self._seconds is None else self._seconds * DECAY
        share = 1.0 if self._seconds is None else 1 - DECAY
        self._seconds = kept + max(seconds, 0.0) * share


@dataclass(frozen=True, slots=True)
class Costs:
    """What another worker costs: prompts that it computes, and bytes that come from it."""

    computing: Rate  # tokens of prompts per second
    moving: Rate  # bytes of handovers per second
    handover_delay: Delay
    pulling: Rate  # bytes of cached pages per second
    pull_delay: Delay

    @property
    def handed_over_at(self) -> float | None:
        """When a handover was last measured; what it told depends on what the worker had cached."""
        moments = (self.computing.measured_at, self.moving.measured_at)
        return max((at for at in moments if at is not None), default=None)

    @classmethod
    def with_prior(cls, prior: Costs | None = None) -> Costs:
        """Of a worker not yet measured: as ``prior``, or as assumed of any."""
        if prior is None:
            moved = (Rate(BYTES_PER_S), Delay(DELAY_S))
            return cls(Rate(REMOTE_TOKENS_PER_S), *moved, Rate(BYTES_PER_S), Delay(DELAY_S))
        return cls(
            Rate(prior.computing),
            Rate(prior.moving),
            Delay(prior.handover_delay),
            Rate(prior.pulling),
            Delay(prior.pull_delay),
        )


class PeerCosts:
    """The costs of each other worker by boot identity; of at most MAX_PEERS, those met last."""

    def __init__(self) -> None:
        self._all = Costs.with_prior()
        self._each: OrderedDict[str, Costs] = OrderedDict()

    def of(self, boot_id: str) -> Costs:
        """What the worker is expected to cost."""
        return self._each.get(boot_id, self._all)

    def to_learn(self, boot_id: str) -> tuple[Costs, Costs]:
        """What an observation of the worker is told to: its own costs and those of all."""
        if boot_id not in self._each:
            self._each[boot_id] = Costs.with_prior(self._all)
        self._each.move_to_end(boot_id)
        while len(self._each) > MAX_PEERS:
            self._each.popitem(last=False)
        return self._each[boot_id], self._all

    def forget(self, boot_id: str) -> None:
        """The worker is gone; what all are like stays."""
        self._each.pop(boot_id, None)
