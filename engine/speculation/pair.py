"""Two speculators of one engine: what one has nothing for, the other drafts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.plan import Drafted
from engine.speculation.lengths import StepTimes
from engine.speculation.proposer import Floats
from engine.speculation.speculator import SpeculationStats, Speculator

# Drafts that cost nothing to make are as good as those of a head that are right so much more often.
_AS_GOOD = 0.7


class SpeculatorPair:
    """``first`` makes drafts for nothing, where it can make any; ``then`` says beforehand what its
    drafts promise, and makes them for sequences to which ``first`` promises clearly less. Both know
    every sequence and share their ``times``. Used like a ``Speculator``."""

    def __init__(self, first: Speculator, then: Speculator) -> None:
        self.first, self.then = first, then
        self._drafted_by: dict[str, Speculator] = {}

    @property
    def times(self) -> StepTimes:
        return self.first.times

    @times.setter
    def times(self, times: StepTimes) -> None:
        self.first.times = self.then.times = times

    @property
    def hidden_width(self) -> int:
        return max(self.first.hidden_width, self.then.hidden_width)

    @property
    def all_stats(self) -> tuple[SpeculationStats, ...]:
        return (self.first.stats, self.then.stats)

    def begin(self, name: str, tokens: Sequence[int], tenant: str) -> None:
        self.first.begin(name, tokens, tenant)
        self.then.begin(name, tokens, tenant)

    def forget(self, name: str) -> None:
        self._drafted_by.pop(name, None)
        self.first.forget(name)
        self.then.forget(name)

    def verified(
        self,
        name: str,
        drafts: Sequence[int],
        token_ids: Sequence[int],
        hidden: Floats | None = None,
    ) -> None:
        drafter = self._drafted_by.pop(name, None)
        for each in (self.first, self.then):
            each.verified(name, drafts if each is drafter else (), token_ids, hidden)

    def drafts(self, left: Mapping[str, int], prompt_rows: int) -> list[Drafted]:
        if not left:
            return []
        offered = self.first.offered(left) if self.first.wakes(left) else {}
        good = {
            name
            for name, draft in offered.items()
            if self.first.chance(name, draft) >= _AS_GOOD * self.then.chance(name)
        }
        rest = {name: number for name, number in left.items() if name not in good}
        planned = {}
        if self.then.wakes(left) and rest:
            rows = prompt_rows + sum(len(offered[name].tokens) for name in good)
            planned = self.then.planned(rest, rows, others=len(good))
        kept = {name: draft for name, draft in offered.items() if name not in planned}
        found = self.first.chosen(kept, left, prompt_rows) if kept else []
        more = []
        if planned:
            num_rows = len(left) + sum(len(each.tokens) for each in found)
            more = self.then.made(planned, num_rows)
        self._drafted_by = {each.name: self.first for each in found}
        self._drafted_by |= {each.name: self.then for each in more}
        return found + more
