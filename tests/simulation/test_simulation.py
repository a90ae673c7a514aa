"""The services under chance: hundreds of histories with faults, and what holds in all of them.

``python -m tests.simulation`` runs more of them; a failure prints a small history that replays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.simulation.campaign import Report, begin, explained, explore_in_processes
from tests.simulation.draw import draw
from tests.simulation.planted import PLANTED, planted
from tests.simulation.scenario import Ask, Fault, Scenario, Setup
from tests.simulation.shrink import shrunk
from tests.simulation.world import simulate

SEEDS, MORE_SEEDS = 1_200, 20_000
MOST_SEEDS_TO_A_BUG, MOST_RUNS = 300, 80

SETUP = Setup(
    num_prefill=1,
    num_decode=1,
    prefill_pages=32,
    decode_pages=32,
    max_sequences=4,
    chunk_tokens=8,
    min_remote_tokens=16,
    lease_s=0.3,
    handover_idle_s=1.5,
    max_prompts=64,
    swap_pages=0,
    max_latency_s=0.001,
    max_step_s=0.02,
    num_layer_groups=2,
)

LONG_ASK = Ask(at=0.0, text=0, num_prompt=97, max_tokens=10)

SOMETIMES = (
    "a decode drained in generate",
    "a prefill drained in prefill",
    "a wall clock was set",
    "cut in identify",
    "cut in lease",
    "lease absent",
    "lease granted",
    "pull absent",
    "pull failed_precondition",  # the lease had ended at the holder
    "pull busy",
    "pull landed",
    "pull not_granted",
    "pull silent",
    "pull unavailable",
    "a decode died in generate",
    "a decode died in prefill",
    "a decode stood still",
    "a lease ran out",
    "a damaged page in swap was computed again",
    "a page waited for its reader or writer",
    "a prefill died in prefill",
    "a prefill stood still",
    "a request again: ABORTED",  # a stale attempt is refused
    "a request again: OK",
    "cut in generate",
    "cut in prefill",
    "cut in release",
    "finished, found in the cache",
    "finished, handed over",
    "finished, preempted",
    "handover aborted",  # replaced by a newer attempt
    "handover boot_id",  # restarted in between
    "handover commit",
    "handover digest",
    "handover incomplete",
    "handover order",
    "handover resource_exhausted",
    "handover silent",
    "handover unavailable",
    "late in prefill",
    "pages came back from swap",
    "request DeadlineExceeded",
    "request PeerUnavailable",
    "request left",
    "request ok",
    "swap in prefill",
    "the index acted and was not heard",
    "the index was away",
    "twice in prefill",
)
"""States that many seeds must come to, or they do not show what they seem to."""


def check(report: Report) -> None:
    assert not report.failures, "\n\n".join(["", *report.failures])
    missing = [state for state in SOMETIMES if not report.reached[state]]
    assert not missing, f"never reached in {report.num_seeds} seeds: {missing}"


@pytest.mark.timeout(600)
def test_histories_with_faults_end_with_the_right_tokens_and_no_page_lost() -> None:
    report = explore_in_processes(SEEDS)
    assert report.num_seeds == SEEDS
    check(report)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_thousand_more() -> None:
    check(explore_in_processes(MORE_SEEDS, first=SEEDS))


def test_a_seed_is_a_history_in_every_process() -> None:
    """Whatever order sets of strings have there."""
    running = [begin("0:20", PYTHONHASHSEED=seed) for seed in ("1", "2")]
    first, second = [Report.from_json(process.communicate()[0]) for process in running]
    assert first.digest == second.digest
    assert first.reached == second.reached


def test_one_fault_less_leaves_the_rest_of_a_history_as_it_was() -> None:
    """Otherwise a failing history could not be shrunk."""
    scenario = draw(3)
    idle = replace(scenario.faults[0], kind="late", node="prefill", call=99)
    with_idle = replace(scenario, faults=(*scenario.faults, idle))
    assert simulate(scenario).digest == simulate(with_idle).digest


def test_a_failure_is_told_with_a_history_that_can_be_pasted() -> None:
    with planted("a page is freed under its writer"):
        seed = next(seed for seed in range(MOST_SEEDS_TO_A_BUG) if simulate(draw(seed)).problems)
        told = explained(draw(seed))
        history = told.rpartition("--history '")[2].rstrip("'")
        problems = simulate(Scenario.from_json(history)).problems
        assert problems
        assert all(problem in told for problem in problems)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found_and_its_history_shrinks_and_replays(name: str) -> None:
    with planted(name):
        seed = next(seed for seed in range(MOST_SEEDS_TO_A_BUG) if simulate(draw(seed)).problems)
        smallest = shrunk(draw(seed), lambda each: bool(simulate(each).problems), MOST_RUNS)
        again = Scenario.from_json(smallest.to_json())
        assert simulate(again).problems == simulate(smallest).problems != []
        assert not any(simulate(less).problems for less in one_part_less(again))
    assert not simulate(again).problems


def one_part_less(scenario: Scenario) -> Iterator[Scenario]:
    """Nothing is left in a shrunk history that it could fail without."""
    for number in range(len(scenario.asks)):
        yield scenario.without_asks(number, number + 1)
    for number in range(len(scenario.faults)):
        yield scenario.without_faults(number, number + 1)


SWEEPS = {
    "the client leaves": lambda at: (replace(LONG_ASK, leaves_s=at), ()),
    "time is over": lambda at: (replace(LONG_ASK, timeout_s=at), ()),
    "the prefill dies": lambda at: (LONG_ASK, (Fault("crash", "prefill0", at=at, seconds=0.05),)),
    "the decode dies": lambda at: (LONG_ASK, (Fault("crash", "decode0", at=at, seconds=0.05),)),
    "the prefill freezes": lambda at: (LONG_ASK, (Fault("freeze", "prefill0", at=at, seconds=3),)),
}


@pytest.mark.parametrize("what", SWEEPS)
def test_at_every_moment_of_a_request(what: str) -> None:
    """One history for each moment, from before the request to after its last token."""
    for moment in range(1, 61):
        ask, faults = SWEEPS[what](moment * 0.006)
        scenario = Scenario(moment, SETUP, (ask, replace(ask, text=1)), faults)
        assert simulate(scenario).problems == [], scenario.to_json()


def test_a_replaced_attempt_fails_at_once_and_not_at_its_deadline() -> None:
    """It went on telling of its progress, which nobody could tell from a long queue."""
    ask = Ask(at=0.5, text=0, num_prompt=97, max_tokens=2)
    for delay_s in (0.001, 0.005, 0.02):
        again = Fault("again", "prefill", call=0, seconds=delay_s, bit=1)
        result = simulate(Scenario(1, SETUP, (ask,), (again,)))
        assert not result.problems
        assert {"handover aborted", "request ok"} <= result.reached
