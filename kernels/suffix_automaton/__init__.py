"""Every run of tokens of a growing text, and where each stood last.

The suffix automaton (Blumer et al., 1985, "The smallest automaton recognizing the subwords of a
text"; online construction). A state stands for all runs that end at the same positions; its link
leads to that of its longest shorter suffix. Appending a token takes constant time on average, and
the state of the whole text's link is the longest suffix that stood before: the longest match.

Native where the kernels are, because a token of every sequence is appended between two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from kernels import dispatch


class Match(NamedTuple):
    """The last ``length`` tokens of a text stand in the automaton's text too, which goes on at
    position ``after``."""

    length: int = 0
    after: int = 0


class Reader(Protocol):
    """Follows another text through an automaton, which may grow meanwhile."""

    def read(self, tokens: Sequence[int]) -> None: ...

    @property
    def match(self) -> tuple[int, int]:
        """The longest suffix of what was read that stands in the automaton's text: a ``Match``."""
        ...


class SuffixAutomaton(Protocol):
    """``len`` of it is that of its text; tokens are any integers of 32 bits."""

    def __len__(self) -> int: ...

    def append(self, tokens: Sequence[int]) -> None: ...

    def tokens(self, start: int, end: int) -> list[int]:
        """Those of the text from ``start`` to ``end``, or to its end."""
        ...

    @property
    def repeat(self) -> tuple[int, int]:
        """The longest suffix of the text that stood in it before: a ``Match``."""
        ...

    def reader(self) -> Reader: ...


def suffix_automaton() -> SuffixAutomaton:
    """Of an empty text, in this process's back end."""
    made: SuffixAutomaton = dispatch.implementation("suffix_automaton").suffix_automaton()
    return made
