"""The drafts of one engine: asks the proposer, decides how many, learns from what came."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from engine.modes import SPECULATION_MODES
from engine.plan import Drafted
from engine.speculation.lengths import Acceptance, StepTimes, best_lengths
from engine.speculation.prompt_lookup import PromptLookup
from engine.speculation.proposer import Draft, Proposer

log = logging.getLogger(__name__)

MOST_DRAFTS = 15


@dataclass(slots=True)
class SpeculationStats:
    """What drafts did so far. ``accepted_at[i]`` counts those right at position ``i`` of a draft;
    each accepted one saved a pass. ``draft_time`` is in seconds."""

    proposed: int = 0
    accepted_at: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)
    failures: int = 0
    draft_time: float = 0.0

    @property
    def accepted(self) -> int:
        return sum(self.accepted_at)


class Speculator:
    """Sequences by name. One thread uses it."""

    def __init__(self, proposer: Proposer, vocab_size: int, times: StepTimes) -> None:
        self.proposer = proposer
        self.times = times
        self.stats = SpeculationStats()
        self._vocab_size = vocab_size
        self._acceptance: dict[str, Acceptance] = {}

    def begin(self, name: str, tokens: Sequence[int], tenant: str) -> None:
        """A new sequence, with all tokens that it has already."""
        self._acceptance[name] = Acceptance()
        self._guarded(name, lambda: self.proposer.begin(name, tokens, tenant))

    def forget(self, name: str) -> None:
        """The sequence is over. Unknown names are fine."""
        if self._acceptance.pop(name, None) is not None:
            self._guarded(name, lambda: self.proposer.forget(name))

    def verified(self, name: str, drafts: Sequence[int], token_ids: Sequence[int]) -> None:
        """A step took ``token_ids`` into the sequence, after these drafts."""
        num_right = _num_equal(drafts, token_ids)
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
        self._guarded(name, lambda: self.proposer.extend(name, token_ids))

    def drafts(self, left: Mapping[str, int], prompt_rows: int) -> list[Drafted]:
        """For the next step, in which each of these sequences has a row and may still bring so many
        tokens, and which may have so many rows of prompts."""
        began = time.perf_counter()
        known = {name: most for name, most in left.items() if name in self._acceptance}
        each = {name: self._propose(name, most - 1) for name, most in known.items()}
        found = {name: draft for name, draft in each.items() if draft.tokens}
        self.stats.draft_time += time.perf_counter() - began
        if not found:
            return []
        rates = [self._acceptance[name].rate(draft.confidence) for name, draft in found.items()]
        most = [len(draft.tokens) for draft in found.values()]
        lengths = best_lengths(rates, most, len(left), len(left) + prompt_rows, self.times)
        return [
            Drafted(name, draft.tokens[:length])
            for (name, draft), length in zip(found.items(), lengths, strict=True)
            if length
        ]

    def _propose(self, name: str, most: int) -> Draft:
        most = min(most, MOST_DRAFTS)
        if most < 1:
            return Draft()
        try:
            draft = self.proposer.propose(name, most)
        except Exception:
            self._give_up(name)
            return Draft()
        usable = _usable(draft.tokens[:most], self._vocab_size)
        return Draft(usable, min(max(draft.confidence, 0.0), 1.0))

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            self._give_up(name)

    def _give_up(self, name: str) -> None:
        """The sequence goes on without drafts."""
        log.exception("proposer=%s failed for sequence=%s", self.proposer.name, name)
        self.stats.failures += 1
        self._acceptance.pop(name, None)


def _usable(tokens: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """Up to the first that is no token."""
    usable = []
    for token in tokens:
        if not 0 <= token < vocab_size:
            break
        usable.append(token)
    return tuple(usable)


def _num_equal(drafts: Sequence[int], token_ids: Sequence[int]) -> int:
    for position, (draft, token_id) in enumerate(zip(drafts, token_ids, strict=False)):
        if draft != token_id:
            return position
    return min(len(drafts), len(token_ids))


def open_speculator(proposer: str, vocab_size: int, times: StepTimes) -> Speculator:
    """Of the named proposer. Raises ValueError for an unknown one."""
    if proposer != "lookup":
        raise ValueError(
            f"proposer must be one of {', '.join(SPECULATION_MODES[1:])}, not {proposer!r}"
        )
    return Speculator(PromptLookup(), vocab_size, times)
