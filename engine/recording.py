"""What a scheduler was told and what it answered, a JSON line each; and the same once more (law 9).

A recording begins with a line that says how large the pool is and what the limits are. Then come
``plan`` lines (events in, plan out) and ``complete`` lines (outcomes in, effects out), as they
happened. A fresh scheduler given the same events and outcomes must give the same answers. Imports
neither torch, grpc nor redis.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from engine.plan import Event, Outcome, StepEffects, StepPlan
from engine.scheduler import Scheduler, SchedulerLimits
from kvstore.pool import PagePool
from kvstore.prefix_hash import PrefixHasher

_EVENTS: dict[str, Any] = {event.__name__: event for event in get_args(Event)}


class RecordingError(Exception):
    """The file is not a recording, or none that this version can read."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Line ``line`` of a recording has another answer than the scheduler gave this time."""

    line: int
    recorded: str
    given: str


class RecordedScheduler(Scheduler):
    """A scheduler that appends everything to a file; each line is there as soon as it happened."""

    def __init__(
        self,
        pool: PagePool,
        limits: SchedulerLimits,
        fingerprint: bytes,
        path: Path,
        num_swap_slots: int = 0,
    ) -> None:
        super().__init__(pool, limits, _hashers(fingerprint, pool.page_size), num_swap_slots)
        self._path = path
        self._write(
            "begin",
            num_pages=pool.num_pages,
            page_size=pool.page_size,
            limits=asdict(limits),
            fingerprint=fingerprint.hex(),
            num_swap_slots=num_swap_slots,
        )

    def plan(self, events: Iterable[Event]) -> StepPlan:
        events = tuple(events)
        plan = super().plan(events)
        if events or plan != StepPlan():
            told = [{"event": type(event).__name__, **_plain(event)} for event in events]
            self._write("plan", events=told, plan=_plain(plan))
        return plan

    def complete(self, plan: StepPlan, outcomes: Mapping[str, Outcome | None]) -> StepEffects:
        effects = super().complete(plan, outcomes)
        self._write("complete", outcomes=_plain(outcomes), effects=_plain(effects))
        return effects

    def _write(self, kind: str, **what: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"kind": kind, **what}, separators=(",", ":")) + "\n")


def replay(path: Path) -> Iterator[Difference | None]:
    """Runs a recording again; for each answer in it None, or how it differs.

    The last line may be torn, as a killed process leaves it. Raises RecordingError, OSError.
    """
    scheduler: Scheduler | None = None
    plan = StepPlan()
    for number, line in _lines(path):
        try:
            if line["kind"] == "begin":
                scheduler = _scheduler(line)
                continue
            if scheduler is None:
                raise RecordingError(f"{path}:{number}: it does not begin with a beginning")
            if line["kind"] == "plan":
                plan = scheduler.plan([_event(told) for told in line["events"]])
                recorded, given = line["plan"], _plain(plan)
            else:
                outcomes = {
                    name: None if told is None else _value(Outcome, told)
                    for name, told in line["outcomes"].items()
                }
                recorded, given = line["effects"], _plain(scheduler.complete(plan, outcomes))
        except (KeyError, TypeError, ValueError) as error:
            raise RecordingError(f"{path}:{number}: {error!r}") from error
        yield None if recorded == given else Difference(number, str(recorded), str(given))


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open() as file:
        for number, text in enumerate(file, start=1):
            if not text.endswith("\n"):
                return
            try:
                yield number, json.loads(text)
            except ValueError as error:
                raise RecordingError(f"{path}:{number}: not JSON: {error}") from error


def _scheduler(line: dict[str, Any]) -> Scheduler:
    pool = PagePool(line["num_pages"], line["page_size"], clock=lambda: 0.0)
    hashers = _hashers(bytes.fromhex(line["fingerprint"]), pool.page_size)
    limits = SchedulerLimits(**line["limits"])
    return Scheduler(pool, limits, hashers, line["num_swap_slots"])


def _hashers(fingerprint: bytes, page_size: int) -> Any:
    return lambda tenant: PrefixHasher(tenant, fingerprint, page_size)


def _event(told: dict[str, Any]) -> Event:
    event: Event = _value(_EVENTS[told["event"]], told)
    return event


def _value(kind: Any, plain: Any) -> Any:
    """An event, or a field of one, from what ``_plain`` made of it."""
    if isinstance(plain, dict) and isinstance(kind, type):
        hints = get_type_hints(kind)
        return kind(**{name: _value(hint, plain[name]) for name, hint in hints.items()})
    if isinstance(plain, list):
        inner = get_args(kind)[:1]
        return tuple(_value(inner[0] if inner else Any, each) for each in plain)
    if kind is bytes:
        return bytes.fromhex(plain)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(plain)
    return plain


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and bytes as JSON has them."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value.hex() if isinstance(value, bytes) else value
