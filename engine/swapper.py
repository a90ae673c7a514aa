"""Carries out what a plan says about swapping, and measures it; on the worker's thread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from engine.outputs import StepStats
from engine.plan import Event, Landed, Measured, StepPlan
from engine.swapping import Rates, SwapIn, smoothed
from engine.telemetry.clock import now_ns
from kvstore.memory import PageMemory
from kvstore.swap import SwapSpace


class Swapper:
    """Pages between a pool's memory and the room beside it. Events are for the next plan."""

    def __init__(self, space: SwapSpace, memory: PageMemory, page_size: int) -> None:
        self._space = space
        self._memory = memory
        self._page_size = page_size
        self._rates = Rates()
        self._events: list[Event] = []

    def exchange(self, plan: StepPlan) -> StepStats:
        """Carries pages out, then others in, before anybody writes to a slot of the plan."""
        started = now_ns()
        num_out = sum(
            self._space.store(page.swap_slot, page.page_name, self._memory.page(page.slot))
            for page in plan.swap_outs
        )
        num_in = sum(map(self._bring_in, plan.swap_ins))
        if num_out + num_in:
            copy_s = (now_ns() - started) / 1e9 / (num_out + num_in)
            both_ways_s = smoothed(self._rates.swap_s_per_page, 2 * copy_s)
            self._measured(replace(self._rates, swap_s_per_page=both_ways_s))
        num_wanted = sum(len(each.pages) for each in plan.swap_ins)
        return StepStats(swapped_out=num_out, swapped_in=num_in, swap_lost=num_wanted - num_in)

    def learn(self, step: StepStats) -> None:
        """Steps of mostly prompt rows say what computing a token again would take."""
        if step.step_time and 2 * step.prompt_rows >= step.step_rows:
            per_token_s = smoothed(self._rates.prefill_s_per_token, step.step_time / step.step_rows)
            self._measured(replace(self._rates, prefill_s_per_token=per_token_s))

    def take_events(self) -> Iterator[Event]:
        """What has landed or was measured since the last call."""
        events, self._events = self._events, []
        return iter(events)

    def close(self) -> None:
        self._space.close()

    def _bring_in(self, wanted: SwapIn) -> int:
        """Brings a sequence's pages in up to the first that is not intact; how many that are."""
        num_pages = 0
        for page in wanted.pages:
            target = self._memory.page(page.slot)
            if not self._space.load(page.swap_slot, page.page_name, target):
                break
            num_pages += 1
        num_tokens = (wanted.num_cached_pages + num_pages) * self._page_size
        self._events.append(Landed(wanted.name, num_tokens))
        return num_pages

    def _measured(self, rates: Rates) -> None:
        self._rates = rates
        self._events.append(Measured(rates))
