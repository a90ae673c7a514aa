"""The drafts of one engine: asks the proposer, decides how many, learns from what came."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from math import inf

from engine.plan import Drafted
from engine.speculation.balance import Balance
from engine.speculation.lengths import (
    USUAL_WEIGHT,
    WORD_WEIGHT,
    Acceptance,
    Lengths,
    StepTimes,
    best_lengths,
)
from engine.speculation.proposer import Draft, Floats, Proposer

log = logging.getLogger(__name__)

MOST_DRAFTS = 15
_USUAL_STEP, _RETURN_STEP = 0.02, 0.001
# Positions of a draft that are told apart; later ones are as good as the last of these.
_POSITIONS = 4


@dataclass(slots=True)
class SpeculationStats:
    """What a proposer's drafts did so far. ``accepted_at[i]`` counts those right at position ``i``
    of a draft; each accepted one saved a pass. ``draft_time`` is in seconds."""

    proposer: str = ""
    proposed: int = 0
    accepted_at: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)
    failures: int = 0
    draft_time: float = 0.0

    @property
    def accepted(self) -> int:
        return sum(self.accepted_at)


@dataclass(slots=True)
class _Missed:
    """What a sequence got while the proposer rested."""

    tokens: list[int] = field(default_factory=list)
    hidden: Floats | None = None  # of the last one


class Speculator:
    """Sequences by name. One thread uses it."""

    def __init__(self, proposer: Proposer, vocab_size: int, times: StepTimes) -> None:
        self.proposer = proposer
        self.times = times
        self.stats = SpeculationStats(proposer.name)
        self._vocab_size = vocab_size
        self._acceptance: dict[str, Acceptance] = {}
        self._contexts: dict[str, int] = {}  # tokens
        self._usual = proposer.expects
        self._usual_at = [proposer.expects or 0.0] * _POSITIONS
        self._balance = Balance()
        self._rests = False
        self._token_s = 0.0
        self._missed: dict[str, _Missed] = {}

    def begin(self, name: str, tokens: Sequence[int], tenant: str) -> None:
        """A new sequence, with all tokens that it has already."""
        self._acceptance[name] = Acceptance()
        self._contexts[name] = len(tokens)
        self._guarded(name, lambda: self.proposer.begin(name, tokens, tenant))

    def forget(self, name: str) -> None:
        """The sequence is over. Unknown names are fine."""
        if self.proposer.remembers:
            self._catch_up(name)
        self._missed.pop(name, None)
        self._contexts.pop(name, None)
        if self._acceptance.pop(name, None) is not None:
            self._guarded(name, lambda: self.proposer.forget(name))

    @property
    def hidden_width(self) -> int:
        """How wide the hidden rows of the next step are that ``verified`` is to be told; 0: none,
        nothing will be drafted after it."""
        return 0 if self._balance.rests_on else self.proposer.hidden_width

    def verified(
        self,
        name: str,
        drafts: Sequence[int],
        token_ids: Sequence[int],
        hidden: Floats | None = None,
    ) -> None:
        """A step took ``token_ids`` into the sequence, after these drafts. ``hidden [H]`` is what
        the target's last layer made of the row that gave the last of them."""
        if name in self._contexts:
            self._contexts[name] += len(token_ids)
        if self._rests and not drafts:
            missed = self._missed.get(name)
            if missed is None:
                missed = self._missed[name] = _Missed()
            missed.tokens += token_ids
            missed.hidden = hidden
            self._learn_usual(0, 0)
            return
        began = time.perf_counter()
        num_right = _num_equal(drafts, token_ids)
        self._learn_usual(len(drafts), num_right)
        self.stats.proposed += len(drafts)
        for position in range(num_right):
            self.stats.accepted_at[position] += 1
        acceptance = self._acceptance.get(name)
        if acceptance is None:
            return
        if drafts:
            acceptance.verified(len(drafts), num_right)
        else:
            acceptance.idle()
        self._guarded(name, lambda: self.proposer.extend(name, token_ids, hidden))
        self._balance.add(num_right * self._token_s - (time.perf_counter() - began))

    def wakes(self, names: Collection[str]) -> bool:
        """Whether it drafts for the next step, of these sequences; to be asked once a step. What
        has lately cost more than it gained rests for a while."""
        step_s = self.times.seconds(len(names), self._attention_s(names))
        self._token_s = step_s / len(names)
        self._rests = self._balance.rests(step_s)
        if not self._rests and self._missed:
            began = time.perf_counter()
            for name in [*self._missed]:
                self._catch_up(name)
            self._balance.add(began - time.perf_counter())
        return not self._rests

    def _catch_up(self, name: str) -> None:
        missed = self._missed.pop(name, None)
        if missed is not None and name in self._acceptance:
            self._acceptance[name].idle(len(missed.tokens))
            self._guarded(name, lambda: self.proposer.extend(name, missed.tokens, missed.hidden))

    def _learn_usual(self, num_drafts: int, num_right: int) -> None:
        """What a proposer that says it beforehand promises is soon held against what came of all
        sequences' drafts, also by their position, and slowly believed again where it is not
        tried."""
        expects = self.proposer.expects
        if self._usual is None or expects is None:
            return
        num_tried = min(num_right + 1, num_drafts)
        if num_drafts:
            self._usual += _USUAL_STEP * (num_right - num_tried * self._usual)
        else:
            self._usual += _RETURN_STEP * (expects - self._usual)
        for position, rate in enumerate(self._usual_at):
            if position < num_tried:
                self._usual_at[position] += _USUAL_STEP * ((position < num_right) - rate)
            elif position >= num_drafts:
                self._usual_at[position] += _RETURN_STEP * (expects - rate)

    @property
    def _shape(self) -> Sequence[float]:
        """How much likelier than others the first drafts are right, the second, ..."""
        return [rate / self._usual for rate in self._usual_at] if self._usual else ()

    @property
    def all_stats(self) -> tuple[SpeculationStats, ...]:
        return (self.stats,)

    def drafts(self, left: Mapping[str, int], prompt_rows: int) -> list[Drafted]:
        """For the next step, in which each of these sequences has a row and may still bring so many
        tokens, and which may have so many rows of prompts."""
        if not left or not self.wakes(left):
            return []
        if self._usual is not None:
            return self.made(self.planned(left, prompt_rows), len(left))
        return self.chosen(self.offered(left), left, prompt_rows)

    def offered(self, left: Mapping[str, int]) -> dict[str, Draft]:
        """All that a proposer has that makes drafts for nothing."""
        began = time.perf_counter()
        drafts = self._proposed(self._most(left))
        self._spent(began)
        return {name: draft for name, draft in drafts.items() if draft.tokens}

    def chosen(
        self, offered: Mapping[str, Draft], left: Mapping[str, int], prompt_rows: int
    ) -> list[Drafted]:
        """What is worth its rows of it, in a step of as many sequences as are ``left``."""
        began = time.perf_counter()
        lengths = self._lengths(
            {name: len(each.tokens) for name, each in offered.items()},
            {name: each.confidence for name, each in offered.items()},
            left,
            (len(left), len(left) + prompt_rows),
        )
        return self._drafted(offered, lengths, len(left), began)

    def planned(self, left: Mapping[str, int], prompt_rows: int, others: int = 0) -> dict[str, int]:
        """How many drafts of each sequence are worth making, of a proposer that promises something
        beforehand. ``others`` are sequences that bring tokens beside these."""
        assert self._usual is not None
        began = time.perf_counter()
        most = self._most(left)
        rows = (len(left) + others, len(left) + others + prompt_rows)
        lengths = self._lengths(most, dict.fromkeys(most, self._usual), left, rows)
        self._spent(began)
        return lengths

    def chance(self, name: str, draft: Draft | None = None) -> float:
        """Of a draft to be right, or of any that the proposer would make; 0 of sequences that it
        has been given up for."""
        if name not in self._acceptance:
            return 0.0
        if draft is not None:
            return self._rate(name, draft.confidence)
        if self._usual is None:
            return 0.0
        return self._rate(name, self._usual) * next(iter(self._shape), 1.0)

    def made(self, lengths: Mapping[str, int], num_rows: int) -> list[Drafted]:
        """Drafts as planned, for a step that has so many rows without them."""
        began = time.perf_counter()
        return self._drafted(self._proposed(lengths), lengths, num_rows, began)

    def _drafted(
        self,
        drafts: Mapping[str, Draft],
        lengths: Mapping[str, int],
        num_rows: int,
        began: float,
    ) -> list[Drafted]:
        """Books what it took to make them, and what their rows will take."""
        found = {name: draft.tokens[: lengths.get(name, 0)] for name, draft in drafts.items()}
        more = sum(map(len, found.values()))
        attention_s = self._attention_s(found)
        with_drafts_s = sum(
            self.times.attention_s(1 + len(tokens), self._contexts.get(name, 0))
            for name, tokens in found.items()
        )
        # What it took to get ready for a sequence was weighed before, against all it may save.
        longest = max(lengths.values(), default=0)
        usual_s = self.proposer.draft_s(longest) if longest else 0.0
        self._spent(began, 2 * usual_s if usual_s else inf)
        self._balance.add(
            self.times.seconds(num_rows, attention_s)
            - self.times.seconds(num_rows + more, with_drafts_s)
        )
        return [Drafted(name, tokens) for name, tokens in found.items() if tokens]

    def _spent(self, began: float, at_most: float = inf) -> None:
        took = time.perf_counter() - began
        self.stats.draft_time += took
        self._balance.add(-min(took, at_most))

    def _most(self, left: Mapping[str, int]) -> dict[str, int]:
        return {
            name: min(number - 1, MOST_DRAFTS)
            for name, number in left.items()
            if number > 1 and name in self._acceptance
        }

    def _rate(self, name: str, expected: float) -> float:
        weight = WORD_WEIGHT if self._usual is None else USUAL_WEIGHT
        return self._acceptance[name].rate(expected, weight)

    def _lengths(
        self,
        most: Mapping[str, int],
        confidence: Mapping[str, float],
        left: Mapping[str, int],
        rows: tuple[int, int],
    ) -> dict[str, int]:
        """Those of the drafts that are worth it. ``rows`` are those that bring tokens, and all."""
        if not most:
            return {}
        rates = [self._rate(name, confidence[name]) for name in most]
        num_tokens, num_rows = rows
        shape = self._shape

        def best(num_rows: int) -> Lengths:
            return best_lengths(
                rates,
                list(most.values()),
                num_tokens,
                num_rows,
                self.times,
                self.proposer.draft_s,
                [self._contexts[name] for name in most],
                self._attention_s(left) * num_tokens / len(left),  # others' are taken to be as long
                shape,
            )

        found = best(num_rows)
        lengths = {name: length for name, length in zip(most, found.each, strict=True) if length}
        starts = {name: start_s for name in lengths if (start_s := self._start_s(name))}
        if not starts:
            return lengths
        # It pays over all that is left, most of which is written in steps without prompts.
        saved_s = best(num_tokens).saved_s if num_rows > num_tokens else found.saved_s
        late = {name for name, start_s in starts.items() if start_s > left[name] * saved_s}
        if not late:
            return lengths
        rest = {name: number for name, number in most.items() if name not in late}
        return self._lengths(rest, confidence, left, rows)

    def _attention_s(self, names: Collection[str]) -> float:
        """Of a step in which each of these sequences has a row."""
        contexts = self._contexts
        return sum(self.times.attention_s(1, contexts.get(name, 0)) for name in names)

    def _start_s(self, name: str) -> float:
        try:
            return self.proposer.start_s(name)
        except Exception:
            self._give_up(name)
            return inf

    def _proposed(self, most: Mapping[str, int]) -> dict[str, Draft]:
        """What can be used of the proposer's drafts. Of several sequences those go without for
        which it raises when asked for each alone."""
        if not most:
            return {}
        try:
            drafts = self.proposer.propose(most)
        except Exception:
            if len(most) > 1:
                each = [self._proposed({name: number}) for name, number in most.items()]
                return {name: draft for part in each for name, draft in part.items()}
            self._give_up(*most)
            return {}
        return {name: self._usable(drafts.get(name, Draft()), most[name]) for name in most}

    def _usable(self, draft: Draft, most: int) -> Draft:
        """Up to the first that is no token."""
        vocabulary = range(self._vocab_size)
        tokens = tuple(takewhile(vocabulary.__contains__, draft.tokens[:most]))
        return Draft(tokens, min(max(draft.confidence, 0.0), 1.0))

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            self._give_up(name)

    def _give_up(self, name: str) -> None:
        """The sequence goes on without drafts."""
        log.exception("proposer=%s failed for sequence=%s", self.proposer.name, name)
        self.stats.failures += 1
        self._missed.pop(name, None)
        if self._acceptance.pop(name, None) is not None:
            with suppress(Exception):
                self.proposer.forget(name)


def _num_equal(drafts: Sequence[int], token_ids: Sequence[int]) -> int:
    for position, (draft, token_id) in enumerate(zip(drafts, token_ids, strict=False)):
        if draft != token_id:
            return position
    return min(len(drafts), len(token_ids))
