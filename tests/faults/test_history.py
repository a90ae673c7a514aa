"""The checker of histories finds every planted wrong one, and nothing in right ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.completion import Delta
from engine.sampling_params import SamplingParams
from tests.faults.history import CANCELLED, OK, OPEN, Record, summary, violations

PROMPT = (1, 2, 3)
TRUTH = (7, 8, 9, 10)


def reference(prompt: tuple[int, ...], params: SamplingParams) -> dict[int, tuple[int, ...]]:
    return {choice: tuple(token + choice for token in TRUTH) for choice in range(params.n)}


def record(
    *deltas: tuple[int, tuple[int, ...]], outcome: str = OK, choice: int = 0, n: int = 1
) -> Record:
    made = Record(PROMPT, SamplingParams(n=n), deadline_s=5.0, began=100.0)
    made.deltas = [Delta(choice, first, tokens, "") for first, tokens in deltas]
    made.outcome, made.ended, made.ends = outcome, 101.0, 1
    return made


RIGHT: dict[str, Record] = {
    "whole, in one piece": record((0, TRUTH)),
    "whole, token by token": record((0, (7,)), (1, (8,)), (2, (9,)), (3, (10,))),
    "failed before the first token": record(outcome="PeerUnavailable"),
    "failed in the middle": record((0, (7, 8)), outcome="DeadlineExceeded"),
    "cancelled in the middle": record((0, (7,)), outcome=CANCELLED),
}


def late(made: Record) -> Record:
    made.ended = made.began + 6.5
    return made


def twice(made: Record) -> Record:
    made.ends = 2
    return made


WRONG: dict[str, tuple[Record, str]] = {
    "another token": (record((0, (7, 8, 9, 11))), "differs"),
    "another token before the error": (record((0, (8,)), outcome="PeerUnavailable"), "differs"),
    "a token lost in the middle": (record((0, (7,)), (2, (9, 10))), "came where"),
    "a token lost without a gap": (record((0, (7, 9, 10))), "differs"),
    "a token doubled": (record((0, (7, 8)), (1, (8, 9, 10))), "came where"),
    "two tokens in the wrong order": (record((0, (8, 7, 9, 10))), "differs"),
    "a token too many": (record((0, (*TRUTH, 11))), "differs"),
    "an end too early, told as a good one": (record((0, (7, 8))), "of 4 tokens"),
    "a choice that never came": (record((0, TRUTH), n=2), "choice 1 ended well after 0"),
    "another choice's tokens": (record((0, TRUTH), choice=1, n=2), "choice 1 differs"),
    "a choice nobody asked for": (record((0, TRUTH), choice=5), "choice 5 differs"),
    "no end at all": (record((0, (7,)), outcome=OPEN), "hung"),
    "an end after the deadline": (late(record((0, TRUTH))), "hung"),
    "a failure after the deadline": (late(record(outcome="DeadlineExceeded")), "hung"),
    "two ends": (twice(record((0, TRUTH))), "ended 2 times"),
    "an internal error": (record(outcome="EngineFault"), "internal"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_history_passes(name: str) -> None:
    assert violations([RIGHT[name]], reference) == []


@pytest.mark.parametrize("name", WRONG)
def test_a_planted_wrong_history_is_found(name: str) -> None:
    planted, word = WRONG[name]
    found = violations([RIGHT["whole, in one piece"], planted], reference)
    assert any(each.startswith("request 1: ") and word in each for each in found), found
    assert not any(each.startswith("request 0: ") for each in found)


def test_the_summary_counts_every_kind() -> None:
    planted: list[Callable[[], Record]] = [
        lambda: record((0, TRUTH)),
        lambda: record((0, (8,))),
        lambda: record(outcome="PeerUnavailable"),
        lambda: record(outcome=CANCELLED),
        lambda: record(outcome=OPEN),
    ]
    records = [make() for make in planted]
    found = summary(records, violations(records, reference))
    assert (found.ok, found.wrong, found.hung, found.cancelled) == (2, 1, 1, 1)
    assert found.failed == {"PeerUnavailable": 1}
    assert "| wrong | 1 |" in found.table()
