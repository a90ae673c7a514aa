"""A client of the simulation: what it asks, what it got, and what may be wrong with that."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from engine.completion import Delta, Finished
from engine.errors import (
    DeadlineExceeded,
    EngineFault,
    PeerUnavailable,
    QuireError,
    ShuttingDown,
)
from engine.remote import AsyncRemoteEngine
from tests.simulation.reference import expected_tokens, params_of, prompt_of
from tests.simulation.scenario import PATIENCE_S, Ask, Scenario


@dataclass
class Answer:
    """What came, by choice. ``end`` is ``ok``, ``left``, or the name of the error."""

    tokens: dict[int, list[int]]
    reasons: dict[int, str] = field(default_factory=dict)
    finished: Finished | None = None
    error: QuireError | None = None
    end: str = "left"


async def answer_to(ask: Ask, endpoints: Sequence[str]) -> Answer:
    """Sends a request to the first endpoint and reads to the end, or leaves before."""
    answer = Answer({choice: [] for choice in range(ask.choices)})
    try:
        async with asyncio.timeout(ask.leaves_s):
            await _read(ask, endpoints, answer)
        answer.end = "ok"
    except QuireError as error:
        answer.end, answer.error = type(error).__name__, error
    except TimeoutError:
        pass
    return answer


def problems_of(ask: Ask, answer: Answer, scenario: Scenario) -> Iterator[str]:
    """Every stream is a prefix of the right one, all of it if it ended well, and fails only for a
    reason."""
    if answer.error is not None and not _excused(answer, ask, scenario):
        yield f"failed: {answer.end}: {answer.error}"
    for choice, found in answer.tokens.items():
        expected, reason = expected_tokens(ask, choice)
        if tuple(found) != expected[: len(found)]:
            yield f"choice {choice}: {found}, not {expected}"
        elif answer.end == "ok" and (len(found), answer.reasons.get(choice)) != (
            len(expected),
            reason,
        ):
            yield f"choice {choice} ended early: {found}"


async def _read(ask: Ask, endpoints: Sequence[str], answer: Answer) -> None:
    client = AsyncRemoteEngine(endpoints, timeout_s=ask.timeout_s)
    items = client.items(prompt_of(ask), params_of(ask))
    try:
        async for item in items:
            match item:
                case Delta():
                    tokens = answer.tokens[item.choice_index]
                    assert item.first_index == len(tokens), "a token was lost or doubled"
                    tokens += item.token_ids
                    if item.finish_reason:
                        answer.reasons[item.choice_index] = str(item.finish_reason)
                case Finished():
                    answer.finished = item
    finally:
        await items.aclose()
        await client.close()


def _excused(answer: Answer, ask: Ask, scenario: Scenario) -> bool:
    """Whether a request may fail this way among these faults; wrong tokens are never excused, and
    a stream that has begun goes on elsewhere."""
    faults = scenario.faults
    match answer.error:
        case PeerUnavailable() | ShuttingDown() if _nobody_else(scenario):
            return not any(answer.tokens.values())
        case PeerUnavailable():
            return not any(answer.tokens.values()) and any(
                (fault.kind == "crash" and fault.node.startswith("decode"))
                or (fault.kind == "cut" and fault.node == "generate")
                for fault in faults
            )
        case EngineFault() if "two workers died" in str(answer.error):
            return _num_losses(scenario) > 1
        case DeadlineExceeded():
            return ask.timeout_s < PATIENCE_S
        case _:
            return False


def _num_losses(scenario: Scenario) -> int:
    """How often a stream may have lost its worker; two at one token look like its own doing."""
    return sum(
        (fault.kind in ("crash", "freeze") and fault.node.startswith("decode"))
        or (fault.kind in ("cut", "late") and fault.node == "generate")
        for fault in scenario.faults
    )


def _nobody_else(scenario: Scenario) -> bool:
    """Whether who drained may have been the last: the others drained, stood still, or died."""
    away = {"drain", "freeze", "crash"}
    faults = [fault for fault in scenario.faults if fault.node.startswith("decode")]
    drained = any(fault.kind == "drain" for fault in faults)
    nodes = {fault.node for fault in faults if fault.kind in away}
    return drained and len(nodes) >= scenario.setup.num_decode
