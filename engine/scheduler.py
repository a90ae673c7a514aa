"""Continuous batching as a pure function: (state, events) -> plan (design, law 9).

Sequences join and leave at every step. Decode rows go first; prompts share what is left of the
step's budget in chunks. Pages grow on demand; when none are left, the sequence admitted last gives
its pages up and is computed again later, to the same tokens (law 1); or its full pages are swapped
out and back in, where that takes less time. Waiting sequences are admitted
in order, each with pages for all its tokens at once, so nobody holds pages while waiting for pages.

The same scheduler serves both services: a decode service generates, a prefill service has sequences
whose goal is the prompt's pages. Knows no clock, no thread, no tensor: equal events give equal
plans. Imports neither torch, grpc nor redis.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from engine.audit import Holders
from engine.lending import Grant, Lend, Lending
from engine.plan import (
    Admission,
    Cancel,
    Drafted,
    Event,
    Fault,
    FinishedPage,
    Landed,
    Measured,
    Outcome,
    PlannedRows,
    ReadsEnded,
    Reservation,
    StepEffects,
    StepPlan,
    Submit,
)
from engine.sequence import Goal, Sequence
from engine.swapping import Rates, SwapIn, SwapLedger, SwapOut
from kvstore.ledger import PageViolation
from kvstore.pool import PagePool
from kvstore.prefix_hash import PrefixHasher

LAST_CHUNK = 128
"""Rows that a prompt to be handed over ends with: its receiver waits for the pages of the last."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """``chunk_tokens``: prompt rows of one sequence in a step; ``max_step_tokens``: rows of a step;
    ``mixed_prompt_tokens``: prompt rows of a step in which a sequence waits for its next token.

    A prompt whose uncached rest is shorter than ``min_remote_tokens`` is prefilled here.
    """

    max_sequences: int = 64
    max_step_tokens: int = 512
    chunk_tokens: int = 512
    mixed_prompt_tokens: int = 128
    min_remote_tokens: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.max_sequences <= self.max_step_tokens:
            raise ValueError(
                f"max_sequences must be 1 to max_step_tokens ({self.max_step_tokens}), "
                f"not {self.max_sequences}"
            )
        for name in ("chunk_tokens", "mixed_prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


class Scheduler:
    """Owns the pool's accounting and every sequence. One thread uses it."""

    def __init__(
        self,
        pool: PagePool,
        limits: SchedulerLimits,
        hasher: Callable[[str], PrefixHasher],
        num_swap_slots: int = 0,
    ) -> None:
        self.pool = pool
        self.swap = SwapLedger(num_swap_slots)
        self.limits = limits
        self._hasher = hasher
        self._sequences: dict[str, Sequence] = {}
        self._waiting: deque[str] = deque()
        self._followers: dict[str, list[str]] = {}
        self._running: list[str] = []
        self._reserved: set[str] = set()
        self._writing: dict[str, list[int]] = {}
        self._leased: dict[str, list[int]] = {}
        self._lending = Lending(pool)
        self._faults: list[Fault] = []
        self._drafts: dict[str, tuple[int, ...]] = {}
        self._rates = Rates()
        self._swap_outs: list[SwapOut] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._sequences) - len(self._running) - len(self._reserved)

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    def sequence(self, name: str) -> Sequence | None:
        return self._sequences.get(name)

    @property
    def holders(self) -> Holders:
        """Everyone who holds pages as far as this scheduler knows, with their pages."""
        owned = {name: tuple(each.pages) for name, each in self._sequences.items()}
        leased = {**self._leased, **self._lending.lent}
        return Holders(owned, _frozen(leased), _frozen(self._writing))

    def check(self) -> None:
        """Raises AssertionError unless pool and swap agree with themselves and the sequences."""
        self.pool.check()
        self.swap.check()
        assert self.swap.holders().keys() <= self._sequences.keys()

    def plan(self, events: Iterable[Event]) -> StepPlan:
        """Takes the events in, then says what the next step runs."""
        for event in events:
            try:
                self._take(event)
            except PageViolation as violation:
                self._blame(getattr(event, "name", ""), violation)
        preempted = self._grow()
        admitted = self._admit()
        rows, coming = self._plan_rows()
        self._drafts.clear()
        return StepPlan(
            rows=tuple(rows),
            admissions=tuple(admitted.admissions),
            reservations=tuple(admitted.reservations),
            finished_pages=tuple(admitted.finished_pages),
            coming_pages=tuple(coming),
            prefilled=tuple(admitted.prefilled),
            preempted=tuple(preempted),
            swap_outs=self._take_swap_outs(),
            swap_ins=tuple(admitted.swap_ins),
            grants=self._lend_all(),
            faults=self._take_faults(),
        )

    def complete(self, plan: StepPlan, outcomes: Mapping[str, Outcome | None]) -> StepEffects:
        """Books a step that ran. An outcome of None means the sequence failed and is gone."""
        prefilled: list[str] = []
        for rows in plan.rows:
            outcome = outcomes[rows.name]
            if outcome is None:
                self._drop(rows.name)
                continue
            sequence = self._sequences[rows.name]
            try:
                sequence.take(len(rows.tokens) - rows.num_drafts, outcome.token_ids)
                self._seal_full_pages(sequence)
                if self._followers and sequence.has_prompt:
                    self._wake_followers(sequence.name)
                if sequence.goal is Goal.PREFILL and sequence.num_remaining == 0:
                    self._end_prefill(sequence)
                    prefilled.append(sequence.name)
                if outcome.finished:
                    self._drop(rows.name)
                elif rows.num_drafts:
                    self._trim(sequence)
            except PageViolation as violation:
                self._blame(rows.name, violation)
        return StepEffects(tuple(prefilled), self._take_faults())

    # -- events

    def _take(self, event: Event) -> None:
        match event:
            case Submit():
                self._submit(event)
            case Cancel(name):
                self._drop(name)
                self._lending.end(name)
                self.pool.end_lease(self._leased.pop(name, []), name)
            case Landed():
                self._land(event)
            case ReadsEnded(name, slots):
                self.pool.end_reads(slots, name)
            case Measured(rates):
                self._rates = rates
            case Lend():
                self._lending.ask(event)
            case Drafted(name, tokens):
                self._drafts[name] = tokens

    def _submit(self, event: Submit) -> None:
        assert event.name not in self._sequences, event.name
        assert event.prompt
        self._sequences[event.name] = Sequence(
            name=event.name,
            goal=event.goal,
            tokens=[*event.prompt, *event.output],
            num_prompt=len(event.prompt),
            hasher=self._hasher(event.tenant),
            remote=event.remote,
        )
        leader = self._sequences.get(event.after) if event.after else None
        if leader is None or leader.has_prompt:
            self._waiting.append(event.name)
        else:
            self._followers.setdefault(leader.name, []).append(event.name)

    def _land(self, event: Landed) -> None:
        name = event.name
        self.pool.end_writes(self._writing.pop(name, []), name)
        if name not in self._reserved:
            return
        sequence = self._sequences[name]
        self._reserved.remove(name)
        self._running.append(name)
        self.swap.free(name)
        sequence.num_computed = max(event.num_tokens, sequence.num_computed)
        if event.foreign:
            sequence.hasher = sequence.hasher.under(event.foreign)
        self._seal_full_pages(sequence)
        if sequence.has_prompt:
            self._wake_followers(name)

    # -- leaving

    def _blame(self, name: str, violation: PageViolation) -> None:
        """A page violation ends the sequence concerned, not the service (law 5)."""
        self._faults.append(Fault(name, str(violation)))
        self._drop(name)

    def _take_faults(self) -> tuple[Fault, ...]:
        faults, self._faults = self._faults, []
        return tuple(faults)

    def _drop(self, name: str) -> None:
        """The sequence is gone; its pages stay only where others or the cache hold them."""
        sequence = self._sequences.pop(name, None)
        if sequence is None:
            return
        if name in self._running:
            self._running.remove(name)
        self._reserved.discard(name)
        if name in self._waiting:
            self._waiting.remove(name)
        pages, sequence.pages = sequence.pages, []
        self.pool.release(pages, name)
        self.swap.free(name)
        self._wake_followers(name)

    def _preempt(self, name: str) -> None:
        """Takes all pages from a running sequence; it goes first in the queue, to start again."""
        sequence = self._sequences[name]
        self._swap_out(sequence)
        pages, sequence.pages = sequence.pages, []
        self.pool.release(pages, name)
        sequence.page_names.clear()
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        sequence.remote = False
        self._running.remove(name)
        self._waiting.appendleft(name)

    # -- swapping

    def _swap_out(self, sequence: Sequence) -> None:
        """Stores the full pages of a sequence about to lose them, as far as there is room.

        Not those of a prefill sequence: its pages are announced as they are computed.
        """
        if sequence.goal is Goal.GENERATE and self._rates.swap_pays(self.pool.page_size):
            names = sequence.page_names
            swap_slots = self.swap.hold(sequence.name, len(names))
            self._swap_outs += map(SwapOut, sequence.pages, swap_slots, names)

    def _take_swap_outs(self) -> tuple[SwapOut, ...]:
        swap_outs, self._swap_outs = self._swap_outs, []
        return tuple(swap_outs)

    def _swap_in(self, sequence: Sequence, admitted: _Admitted) -> bool:
        """Parks a sequence until its swapped pages are back. The cache may still have some."""
        swap_slots = self.swap.held_by(sequence.name)
        num_cached = len(sequence.page_names)
        if len(swap_slots) <= num_cached:
            self.swap.free(sequence.name)
            return False
        names = sequence.shareable_names()
        pages = tuple(map(SwapOut, sequence.pages, swap_slots, names))[num_cached:]
        self._expect_writes(sequence, [page.slot for page in pages])
        admitted.swap_ins.append(SwapIn(sequence.name, pages, num_cached))
        return True

    # -- growing

    def _grow(self) -> list[str]:
        """Gives every running sequence the pages its tokens need, oldest first; returns the
        preempted ones, youngest first."""
        preempted: list[str] = []
        for name in list(self._running):
            sequence = self._sequences[name]
            missing = self.pool.pages_for(sequence.num_wanted) - len(sequence.pages)
            if missing <= 0 or name in preempted:
                continue
            try:
                while (slots := self.pool.allocate(missing, name)) is None:
                    victim = self._running[-1]
                    self._preempt(victim)
                    preempted.append(victim)
                    if victim == name:
                        break
                else:
                    sequence.pages += slots
            except PageViolation as violation:
                self._blame(name, violation)
        return preempted

    def _trim(self, sequence: Sequence) -> None:
        """Gives back the pages that only rejected drafts needed."""
        keep = self.pool.pages_for(sequence.num_wanted)
        excess, sequence.pages = sequence.pages[keep:], sequence.pages[:keep]
        self.pool.release(excess, sequence.name)

    def _drafts_of(self, sequence: Sequence, num_rows: int) -> tuple[int, ...]:
        """The drafts that fit into so many rows of the step and into pages nobody else needs."""
        drafts = self._drafts.get(sequence.name, ())[: max(num_rows, 0)]
        if not drafts or sequence.goal is not Goal.GENERATE or sequence.num_remaining != 1:
            return ()
        end = len(sequence.tokens)
        missing = self.pool.pages_for(end + len(drafts)) - len(sequence.pages)
        if missing > 0 and self.pool.num_available - missing >= len(self._running):
            sequence.pages += self.pool.allocate(missing, sequence.name) or ()
        return drafts[: len(sequence.pages) * self.pool.page_size - end]

    def _share_budget(self) -> Iterator[tuple[str, int]]:
        """The rows of each running sequence in this step.

        The fewer tokens a sequence still needs, the earlier its turn: decode rows first. Each may
        have an equal share of what is left; what a short one does not use goes to the longer ones,
        so no prompt makes the others wait.
        """
        budget = self.limits.max_step_tokens
        decoding = False
        running = [self._sequences[name] for name in self._running]
        if all(sequence.num_remaining == 1 for sequence in running):  # nearly every step
            yield from ((name, 1) for name in self._running)
            return
        running.sort(key=lambda sequence: sequence.num_remaining)
        for position, sequence in enumerate(running):
            if decoding and sequence.num_remaining > 1:
                budget = min(budget, self.limits.mixed_prompt_tokens)
            share = -(-budget // (len(running) - position))
            count = min(sequence.num_remaining, self.limits.chunk_tokens, share)
            decoding |= sequence.num_remaining == 1
            if sequence.goal is Goal.PREFILL and count == sequence.num_remaining > LAST_CHUNK:
                count -= LAST_CHUNK
            if count:
                budget -= count
                yield sequence.name, count

    # -- admitting

    def _admit(self) -> _Admitted:
        """Lets waiting sequences in, in order, as long as pages and places last."""
        admitted = _Admitted()
        while (
            self._waiting and len(self._running) + len(self._reserved) < self.limits.max_sequences
        ):
            sequence = self._sequences[self._waiting[0]]
            try:
                if not self._give_pages(sequence):
                    break
                self._waiting.popleft()
                self._start(sequence, admitted)
            except PageViolation as violation:
                self._blame(sequence.name, violation)
        return admitted

    def _start(self, sequence: Sequence, admitted: _Admitted) -> None:
        """Puts an admitted sequence where it belongs: reserved, done already, or running."""
        admitted.admissions.append(Admission(sequence.name, sequence.num_computed))
        admitted.finished_pages += self._announce_cached(sequence)
        if self._swap_in(sequence, admitted) or self._reserve(sequence, admitted):
            return
        self._running.append(sequence.name)
        if sequence.has_prompt:
            self._wake_followers(sequence.name)
        if sequence.num_remaining == 0:
            self._end_prefill(sequence)
            admitted.prefilled.append(sequence.name)

    def _give_pages(self, sequence: Sequence) -> bool:
        """Pages for all tokens of a waiting sequence, cached ones shared; all or nothing.

        Beyond its own need one page per running sequence must stay available, or the newcomer would
        be the next to be preempted.
        """
        names = sequence.shareable_names()
        cached = self.pool.match(names)
        missing = self.pool.pages_for(sequence.num_wanted) - len(cached)
        in_use_after = self.pool.num_idle_among(cached) + missing
        if in_use_after + len(self._running) > self.pool.num_available:
            return False
        self.pool.share(cached, sequence.name)
        fresh = self.pool.allocate(missing, sequence.name)
        assert fresh is not None
        sequence.pages = cached + fresh
        sequence.page_names = names[: len(cached)]
        sequence.num_computed = len(cached) * self.pool.page_size
        if not sequence.num_preemptions:
            sequence.cached_tokens = sequence.num_computed
        return True

    def _reserve(self, sequence: Sequence, admitted: _Admitted) -> bool:
        """Parks a sequence whose pages are to come from a prefill service."""
        num_tokens = len(sequence.tokens) - 1
        missing = num_tokens - sequence.num_computed
        if not sequence.remote or missing < max(self.limits.min_remote_tokens, 1):
            return False
        num_cached = len(sequence.page_names)
        slots = sequence.pages[num_cached : self.pool.pages_for(num_tokens)]
        self._expect_writes(sequence, slots)
        admitted.reservations.append(
            Reservation(sequence.name, tuple(slots), num_cached, num_tokens)
        )
        return True

    def _expect_writes(self, sequence: Sequence, slots: list[int]) -> None:
        """Someone else fills these pages; ``Landed`` ends it."""
        for slot in slots:
            self.pool.ledger.begin_write(slot, sequence.name)
        self._writing[sequence.name] = slots
        self._reserved.add(sequence.name)

    def _wake_followers(self, leader: str) -> None:
        """Sequences of the same prompt can share the leader's pages now, of whatever numbers."""
        known = self._sequences.get(leader)
        for name in reversed(self._followers.pop(leader, [])):
            if name in self._sequences:
                self._waiting.appendleft(name)
                if known is not None:
                    self._sequences[name].hasher = known.hasher

    # -- sealing

    def _seal_full_pages(self, sequence: Sequence) -> None:
        full = sequence.num_computed // self.pool.page_size
        for _ in range(len(sequence.page_names), full):
            self._seal_next(sequence)

    def _seal_next(self, sequence: Sequence) -> None:
        index = len(sequence.page_names)
        num_tokens = min(self.pool.page_size, sequence.num_computed - index * self.pool.page_size)
        name = sequence.name_next_page()
        self.pool.seal(sequence.pages[index], name, num_tokens)

    def _end_prefill(self, sequence: Sequence) -> None:
        """Seals the last, partial page and leases all pages under the sequence's name."""
        if len(sequence.page_names) * self.pool.page_size < sequence.num_computed:
            self._seal_next(sequence)
        name = sequence.name
        self.pool.lease(sequence.pages, name)
        self._leased[name] = sequence.pages
        self._running.remove(name)
        del self._sequences[name]

    # -- announcing

    def _announce_cached(self, sequence: Sequence) -> list[FinishedPage]:
        if sequence.goal is not Goal.PREFILL:
            return []
        size = self.pool.page_size
        for slot in sequence.pages[: len(sequence.page_names)]:
            self.pool.ledger.begin_read(slot, sequence.name)
        return [
            FinishedPage(sequence.name, sequence.pages[index], index, size, name)
            for index, name in enumerate(sequence.page_names)
        ]

    def _announce_coming(self, rows: PlannedRows) -> list[FinishedPage]:
        """The pages that these rows finish: their content is settled, so they have names already,
        and their first layers may leave while the last are computed."""
        sequence = self._sequences[rows.name]
        if sequence.goal is not Goal.PREFILL:
            return []
        pages = [
            FinishedPage(sequence.name, sequence.pages[index], index, num_tokens, name)
            for index, num_tokens, name in sequence.coming_pages(rows.start + len(rows.tokens))
        ]
        self.pool.begin_exports([page.slot for page in pages], sequence.name)
        return pages

    # -- plan

    def _plan_rows(self) -> tuple[list[PlannedRows], list[FinishedPage]]:
        rows, coming = [], []
        shares = list(self._share_budget())
        left = self.limits.max_step_tokens - sum(count for _, count in shares)
        for name, count in shares:
            each = self._rows(name, count, left)
            left -= each.num_drafts
            try:
                coming += self._announce_coming(each)
            except PageViolation as violation:
                self._blame(name, violation)
            else:
                rows.append(each)
        return rows, coming

    def _lend_all(self) -> tuple[Grant, ...]:
        """Answers who asked for cached pages, after our own sequences got theirs.

        One page per running sequence stays, and all that the first in the queue waits for.
        """
        needed = len(self._running)
        if self._waiting:
            needed += self.pool.pages_for(self._sequences[self._waiting[0]].num_wanted)
        grants = []
        for event in self._lending.take_asked():
            try:
                grants.append(self._lending.grant(event, needed))
            except PageViolation as violation:
                self._blame(event.name, violation)
        return tuple(grants)

    def _rows(self, name: str, count: int, most_drafts: int) -> PlannedRows:
        sequence = self._sequences[name]
        start = sequence.num_computed
        end = start + count
        drafts = self._drafts_of(sequence, most_drafts)
        return PlannedRows(
            name=name,
            start=start,
            tokens=(*sequence.tokens[start:end], *drafts),
            pages=tuple(sequence.pages[: self.pool.pages_for(end + len(drafts))]),
            wants_logits=sequence.goal is Goal.GENERATE and end == len(sequence.tokens),
            num_drafts=len(drafts),
        )


def _frozen(slots: Mapping[str, list[int]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(each) for name, each in slots.items()}


class _Admitted:
    """What letting sequences in has to tell."""

    def __init__(self) -> None:
        self.admissions: list[Admission] = []
        self.reservations: list[Reservation] = []
        self.finished_pages: list[FinishedPage] = []
        self.prefilled: list[str] = []
        self.swap_ins: list[SwapIn] = []
