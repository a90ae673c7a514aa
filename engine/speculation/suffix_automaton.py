"""Every run of tokens of a growing text, and where each stood last.

The suffix automaton (Blumer et al., 1985, "The smallest automaton recognizing the subwords of a
text"; online construction). A state stands for all runs that end at the same positions; its link
leads to that of its longest shorter suffix. Appending a token takes constant time on average, and
the state of the whole text's link is the longest suffix that stood before: the longest match.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """The last ``length`` tokens of a text stand in the automaton's text too, which goes on at
    position ``after``."""

    length: int = 0
    after: int = 0


class SuffixAutomaton:
    """``tokens`` may be any integers of 32 bits."""

    def __init__(self) -> None:
        self.tokens = array("i")
        self.repeat = Match()  # the longest suffix of the text that stood in it before
        self._last = 0
        self._lengths = array("i", [0])  # of the longest run of each state
        self._links = array("i", [-1])
        self._afters = array("i", [0])  # the position after one of its occurrences
        # Nearly every state has one way out. Those with more have them in ``_ways``.
        self._way_tokens = array("i", [0])
        self._way_states = array("i", [-1])
        self._ways: dict[int, dict[int, int]] = {}

    def append(self, token: int) -> None:
        self.tokens.append(token)
        state, new = self._last, self._new(self._lengths[self._last] + 1, len(self.tokens))
        while state >= 0 and self._next(state, token) < 0:
            self._set_next(state, token, new)
            state = self._links[state]
        link = self._ending(state, token) if state >= 0 else 0
        self._links[new] = link
        self._last = new
        self.repeat = Match(self._lengths[link], self._afters[link])
        self._afters[link] = len(self.tokens)  # the latest occurrence is the one to copy next time

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


class Reader:
    """Follows another text through an automaton, which may grow meanwhile."""

    def __init__(self, automaton: SuffixAutomaton) -> None:
        self.automaton = automaton
        self._state = 0
        self._length = 0

    def read(self, token: int) -> None:
        text = self.automaton
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
        """The longest suffix of what was read that stands in the automaton's text."""
        return Match(self._length, self.automaton._afters[self._state])
