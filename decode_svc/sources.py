"""Where a prompt's missing pages come from: the index is asked, workers chosen, a way decided.

What the index says is a hint; whoever is named may refuse, and then the next best way is taken.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from decode_svc.choose import held_runs
from decode_svc.decider import Decider, Decision, Situation, Way
from decode_svc.wanted import Wanted
from decode_svc.workers import KnownWorkers
from engine.core import EngineCore
from engine.lifecycle import Lifecycle
from engine.plan import Reservation
from engine.telemetry.logs import fields
from engine.telemetry.metrics import Metrics
from engine.telemetry.tracing import stage_span
from kvstore.index import PageIndex, PageIndexError, WorkerRecord
from kvstore.prefix_hash import PrefixHasher

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Route:
    """``holder`` lends the first ``num_pulled`` missing pages, ``prefill`` hands the rest over;
    what neither brings is computed here. Each is None where it is not asked."""

    holder: WorkerRecord | None
    num_pulled: int
    prefill: WorkerRecord | None


@dataclass(frozen=True, slots=True)
class _Hints:
    """By boot identity: pages of the missing ones, from the first on, and tokens of the whole
    prompt that a worker holds."""

    held_pages: dict[str, int]
    hit_tokens: dict[str, int]


class Sources:
    """Finds routes for prompts."""

    def __init__(
        self,
        core: EngineCore,
        index: PageIndex,
        workers: KnownWorkers,
        decider: Decider,
        metrics: Metrics,
    ) -> None:
        self._core = core
        self._index = index
        self._workers = workers
        self._decider = decider
        self._metrics = metrics

    async def route(self, wanted: Wanted, reservation: Reservation, may_pull: bool = True) -> Route:
        """The way on which the missing pages are predicted to come soonest."""
        with stage_span(Lifecycle.CHOOSE) as span:
            hints = await self._hints(wanted, reservation)
            holder = await self._workers.holder(hints.held_pages) if may_pull else None
            prefill = await self._workers.find(hints.hit_tokens, wanted.own_numerics)
            situation = self._situation(reservation, holder, prefill, hints)
            decision = self._decider.decide(situation)
            facts = _facts(decision, situation, holder, prefill)
            span.set_attributes({f"quire.{name}": value for name, value in facts.items()})
        log.info("way chosen", extra=fields(request=wanted.request_id.hex(), **facts))
        if prefill is None and decision.way is Way.LOCAL:
            self._tell_nobody(wanted)
        return Route(
            holder=holder if decision.way.pulls else None,
            num_pulled=hints.held_pages[holder.boot_id] if holder and decision.way.pulls else 0,
            prefill=prefill if decision.way.hands_over else None,
        )

    async def _hints(self, wanted: Wanted, reservation: Reservation) -> _Hints:
        """What the index says of the full pages of the prompt.

        Whoever holds a page that is missing here is taken to hold those before it as well: a prefix
        outlives its continuations.
        """
        core, num_here = self._core, reservation.num_cached_pages
        size = core.settings.page_size
        hasher = PrefixHasher(wanted.tenant, core.fingerprint.digest, size)
        names = hasher.full_pages(wanted.prompt_ids[: reservation.num_tokens])
        if num_here:
            missing, whole = await asyncio.gather(
                self._held(names[num_here:]), self._held(names[:num_here])
            )
        else:
            missing = whole = await self._held(names)
        hit_pages = whole | {boot_id: num_here + count for boot_id, count in missing.items()}
        hit_tokens = {boot_id: count * size for boot_id, count in hit_pages.items()}
        missing.pop(core.boot_id.hex(), None)
        return _Hints(missing, hit_tokens)

    async def _held(self, names: Sequence[bytes]) -> dict[str, int]:
        """How many of the pages each worker holds, from the first on."""
        if not names:
            return {}
        try:
            holders = await self._index.lookup(self._core.fingerprint.digest.hex(), names)
        except PageIndexError as error:
            log.debug("holders not known: %s", error)
            return {}
        return held_runs(holders)

    def _situation(
        self,
        reservation: Reservation,
        holder: WorkerRecord | None,
        prefill: WorkerRecord | None,
        hints: _Hints,
    ) -> Situation:
        size = self._core.settings.page_size
        num_here = reservation.num_cached_pages * size
        return Situation(
            missing=reservation.num_tokens - num_here,
            held=hints.held_pages[holder.boot_id] * size if holder else 0,
            hit=hints.hit_tokens.get(prefill.boot_id, 0) - num_here if prefill else 0,
            queued=prefill.load.queued_tokens if prefill else None,
            num_running=self._core.scheduler.num_running,
            holder=holder.boot_id if holder else "",
            worker=prefill.boot_id if prefill else "",
        )

    def _tell_nobody(self, wanted: Wanted) -> None:
        facts = fields(request=wanted.request_id.hex(), known=self._workers.standing())
        log.info("no prefill worker, the prompt is computed here", extra=facts)
        self._metrics.handovers.labels("no_worker").inc()


def _facts(
    decision: Decision,
    situation: Situation,
    holder: WorkerRecord | None,
    prefill: WorkerRecord | None,
) -> dict[str, str | int | float]:
    """The decision and what it rests on, for trace and log."""
    predicted = {f"predicted_{way}_s": round(s, 6) for way, s in decision.predicted_s.items()}
    return {
        "way": decision.way.value,
        "why": decision.why,
        **predicted,
        "missing_tokens": situation.missing,
        "held_tokens": situation.held,
        "hit_tokens": situation.hit,
        "worker": prefill.boot_id if prefill else "none",
        "holder": holder.boot_id if holder else "none",
    }
