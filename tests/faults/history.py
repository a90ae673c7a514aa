"""What callers saw, and whether it may be: a history of requests and its checker.

A stream that ended well equals the reference, token for token. One that ended with an error is a
prefix of it. Every stream's indices run from 0 without a gap, every request ends by its deadline,
and an end is an end.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from engine.client import AsyncClient
from engine.completion import Delta, Finished
from engine.errors import EngineFault, QuireError
from engine.sampling_params import SamplingParams

GRACE_S = 1.0
Prompt = tuple[int, ...]
Reference = Callable[[Prompt, SamplingParams], Mapping[int, Sequence[int]]]

OK, CANCELLED, OPEN = "ok", "cancelled", "open"


@dataclass
class Record:
    """One request as its caller saw it; times are seconds of one monotonic clock.

    ``outcome`` is "ok", "cancelled" (by the caller), the name of an error, or "open" while it runs.
    """

    prompt: Prompt
    params: SamplingParams
    deadline_s: float
    began: float
    deltas: list[Delta] = field(default_factory=list)
    outcome: str = OPEN
    reason: str = ""
    ended: float = 0.0
    ends: int = 0
    where: str = ""

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def end(self, outcome: str, reason: str = "") -> None:
        self.outcome, self.reason, self.ended = outcome, reason, time.monotonic()
        self.ends += 1

    def tokens(self) -> dict[int, list[int]]:
        """Token ids of each choice, in order of arrival."""
        choices: dict[int, list[int]] = {index: [] for index in range(self.params.n)}
        for delta in self.deltas:
            choices.setdefault(delta.choice_index, []).extend(delta.token_ids)
        return choices


async def observe(
    client: AsyncClient,
    prompt: Prompt,
    params: SamplingParams,
    deadline_s: float,
    history: list[Record],
    stop_after: int | None = None,
) -> Record:
    """Runs one request and writes down what it brings; no error of the service is raised.

    ``stop_after`` deltas the caller goes away.
    """
    record = Record(prompt, params, deadline_s, time.monotonic())
    history.append(record)
    try:
        async with aclosing(client.items(prompt, params)) as items:
            await _take(items, record, stop_after)
    except QuireError as error:
        record.end(type(error).__name__, str(error))
    except BaseException:
        record.end(CANCELLED)
        raise
    return record


async def _take(items: AsyncIterator[object], record: Record, stop_after: int | None) -> None:
    if stop_after == 0:
        return record.end(CANCELLED)
    async for item in items:
        if isinstance(item, Delta):
            record.deltas.append(item)
        if isinstance(item, Finished):
            record.where = item.prefilled
        if stop_after is not None and len(record.deltas) >= stop_after:
            return record.end(CANCELLED)
    return record.end(OK)


def violations(records: Iterable[Record], reference: Reference) -> list[str]:
    """Everything in the history that must not be, in words; empty if all is well."""
    return [
        f"request {number}: {problem}"
        for number, record in enumerate(records)
        for problem in _problems(record, reference(record.prompt, record.params))
    ]


def _problems(record: Record, expected: Mapping[int, Sequence[int]]) -> Iterable[str]:
    if record.outcome == OPEN:
        yield "hung: it has not ended"
        return
    if record.ends != 1:
        yield f"ended {record.ends} times"
    if record.seconds > record.deadline_s + GRACE_S:
        yield f"hung: ended after {record.seconds:.1f} s, its deadline was {record.deadline_s:.1f}"
    if record.outcome == EngineFault.__name__:
        yield f"an internal error: {record.reason}"
    counts: Counter[int] = Counter()
    for delta in record.deltas:
        if delta.first_index != counts[delta.choice_index]:
            yield f"index {delta.first_index} came where {counts[delta.choice_index]} was due"
        counts[delta.choice_index] += len(delta.token_ids)
    for choice, found in record.tokens().items():
        wanted = list(expected.get(choice, ()))
        if found != wanted[: len(found)]:
            yield f"wrong: choice {choice} differs from the truth"
        elif record.outcome == OK and len(found) != len(wanted):
            yield f"wrong: choice {choice} ended well after {len(found)} of {len(wanted)} tokens"


@dataclass(frozen=True, slots=True)
class Summary:
    """A history in numbers."""

    ok: int
    cancelled: int
    failed: Mapping[str, int]
    wrong: int
    hung: int
    p50_s: float
    p99_s: float

    def table(self) -> str:
        failed = ", ".join(f"{name} {count}" for name, count in sorted(self.failed.items()))
        rows = {
            "ok": self.ok,
            "cancelled by the caller": self.cancelled,
            "failed": f"{sum(self.failed.values())} ({failed or 'none'})",
            "wrong": self.wrong,
            "hung": self.hung,
            "p50 of ok, s": f"{self.p50_s:.3f}",
            "p99 of ok, s": f"{self.p99_s:.3f}",
        }
        return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def summary(records: Sequence[Record], found: Sequence[str]) -> Summary:
    failed = Counter(each.outcome for each in records)
    for outcome in (OK, CANCELLED, OPEN):
        failed.pop(outcome, None)
    times = sorted(each.seconds for each in records if each.outcome == OK) or [0.0]
    return Summary(
        ok=sum(each.outcome == OK for each in records),
        cancelled=sum(each.outcome == CANCELLED for each in records),
        failed=dict(failed),
        wrong=sum("wrong" in each or "came where" in each for each in found),
        hung=sum("hung" in each for each in found),
        p50_s=times[len(times) // 2],
        p99_s=times[min(len(times) * 99 // 100, len(times) - 1)],
    )
