from __future__ import annotations

from array import array
from collections.abc import Sequence

from kernels.suffix_automaton import Match, SuffixAutomaton


def suffix_automaton() -> SuffixAutomaton:
    return PlainAutomaton()


class PlainAutomaton:
    def __init__(self) -> None:
        self._text = array("i")
        self.repeat = Match()
        self._last = 0
        self._lengths = array("i", [0])  # of the longest run of each state
        self._links = array("i", [-1])
        self._afters = array("i", [0])  # the position after one of its occurrences
        # Nearly every state has one way out. Those with more have them in ``_ways``.
        self._way_tokens = array("i", [0])
        self._way_states = array("i", [-1])
        self._ways: dict[int, dict[int, int]] = {}

    def __len__(self) -> int:
        return len(self._text)

    def tokens(self, start: int, end: int) -> list[int]:
        return self._text[start:end].tolist()

    def reader(self) -> PlainReader:
        return PlainReader(self)

    def append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._append(token)

    def _append(self, token: int) -> None:
        self._text.append(token)
        state, new = self._last, self._new(self._lengths[self._last] + 1, len(self._text))
        while state >= 0 and self._next(state, token) < 0:
            self._set_next(state, token, new)
            state = self._links[state]
        link = self._ending(state, token) if state >= 0 else 0
        self._links[new] = link
        self._last = new
        self.repeat = Match(self._lengths[link], self._afters[link])
        self._afters[link] = len(self._text)  # the latest occurrence is the one to copy next time

    def _ending(self, state: int, token: int) -> int:
        """The state whose longest run is the longest of ``state`` and ``token``; split off from a
        state of longer ones if need be."""
        target = self._next(state, token)
        length = self._lengths[state] + 1
        if self._lengths[target] == length:
            return target
        split = self._new(length, self._afters[target])
        self._way_tokens[split] = self._way_tokens[target]
        self._way_states[split] = self._way_states[target]
        if target in self._ways:
            self._ways[split] = self._ways[target].copy()
        self._links[split] = self._links[target]
        self._links[target] = split
        while state >= 0 and self._next(state, token) == target:
            self._set_next(state, token, split)
            state = self._links[state]
        return split

    def _new(self, length: int, after: int) -> int:
        self._lengths.append(length)
        self._links.append(0)
        self._afters.append(after)
        self._way_tokens.append(0)
        self._way_states.append(-1)
        return len(self._lengths) - 1

    def _next(self, state: int, token: int) -> int:
        ways = self._ways.get(state)
        if ways is not None:
            return ways.get(token, -1)
        return self._way_states[state] if self._way_tokens[state] == token else -1

    def _set_next(self, state: int, token: int, target: int) -> None:
        ways = self._ways.get(state)
        if ways is not None:
            ways[token] = target
        elif self._way_states[state] < 0 or self._way_tokens[state] == token:
            self._way_tokens[state], self._way_states[state] = token, target
        else:
            first = {self._way_tokens[state]: self._way_states[state]}
            self._ways[state] = first | {token: target}


class PlainReader:
    def __init__(self, automaton: PlainAutomaton) -> None:
        self._automaton = automaton
        self._state = 0
        self._length = 0

    def read(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._read(token)

    def _read(self, token: int) -> None:
        text = self._automaton
        state = self._state
        # States may have been split since: this run may be of the shorter part.
        while state and self._length <= text._lengths[text._links[state]]:
            state = text._links[state]
        target = text._next(state, token)
        while target < 0 and state:
            state = text._links[state]
            self._length = text._lengths[state]
            target = text._next(state, token)
        self._state, self._length = (target, self._length + 1) if target >= 0 else (0, 0)

    @property
    def match(self) -> Match:
        return Match(self._length, self._automaton._afters[self._state])
