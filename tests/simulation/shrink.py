"""From a scenario that fails to a small one that still does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.simulation.scenario import PATIENCE_S, Ask, Scenario

Fails = Callable[[Scenario], bool]


def shrunk(scenario: Scenario, fails: Fails, max_runs: int = 300) -> Scenario:
    """Leaves out and simplifies what the failure does not need. ``fails(scenario)`` is true."""
    runs = 0
    improved = True
    while improved:
        improved = False
        for smaller in _smaller(scenario):
            runs += 1
            if runs > max_runs:
                return scenario
            if fails(smaller):
                scenario, improved = smaller, True
                break
    return scenario


def _smaller(scenario: Scenario) -> Iterator[Scenario]:
    """Simpler scenarios, those with most left out first."""
    yield from _parts_left_out(len(scenario.faults), scenario.without_faults)
    yield from _parts_left_out(len(scenario.asks), scenario.without_asks)
    for number, ask in enumerate(scenario.asks):
        for simpler in _simpler(ask):
            if simpler != ask:
                asks = (*scenario.asks[:number], simpler, *scenario.asks[number + 1 :])
                yield replace(scenario, asks=asks)
    for number, fault in enumerate(scenario.faults):
        if fault.call:
            earlier = replace(fault, call=fault.call - 1)
            faults = (*scenario.faults[:number], earlier, *scenario.faults[number + 1 :])
            yield replace(scenario, faults=faults)


def _parts_left_out(count: int, without: Callable[[int, int], Scenario]) -> Iterator[Scenario]:
    size = count
    while size:
        for start in range(0, count, size):
            yield without(start, min(start + size, count))
        size //= 2


def _simpler(ask: Ask) -> Iterator[Ask]:
    yield replace(ask, leaves_s=None, timeout_s=PATIENCE_S)
    yield replace(ask, temperature=0.0)
    yield replace(ask, choices=1)
    yield replace(ask, max_tokens=1)
    yield replace(ask, at=0.0)
