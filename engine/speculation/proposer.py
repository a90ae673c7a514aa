"""What makes drafts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may come next, and how likely the proposer takes each to be right (0 to 1)
    where those before it were."""

    tokens: tuple[int, ...] = ()
    confidence: float = 0.0


class Proposer(Protocol):
    """Keeps what it knows of each sequence by the sequence's name. Used by one thread.

    It may be wrong, propose ids outside the vocabulary, or raise: drafts that cannot be are not
    used, and a sequence whose proposer raised goes on without.
    """

    @property
    def name(self) -> str: ...

    def draft_s(self, longest: int) -> float:
        """Seconds that drafts take of which the longest has so many tokens, at least one; 0 if that
        is not worth counting."""
        ...

    @property
    def expects(self) -> float | None:
        """The confidence of its drafts where it is known before they are made. Their lengths are
        then decided first; else as much as there is is drafted, and cut."""
        ...

    @property
    def remembers(self) -> bool:
        """Whether it must hear of a sequence's last tokens before it is over."""
        ...

    @property
    def hidden_width(self) -> int:
        """The width of the target's hidden rows if it wants them, else 0."""
        ...

    def begin(self, name: str, tokens: Sequence[int], tenant: str) -> None:
        """A new sequence, with its prompt and the output it has already."""
        ...

    def extend(self, name: str, tokens: Sequence[int], hidden: Floats | None = None) -> None:
        """Tokens were chosen, in one step or in several. ``hidden [H]`` is what the target's last
        layer made of the token before the last, for those who want it."""
        ...

    def propose(self, most: Mapping[str, int]) -> Mapping[str, Draft]:
        """Of each sequence at most so many tokens after all that it has."""
        ...

    def start_s(self, name: str) -> float:
        """Seconds before its first draft, such as for a prompt that a draft model has not read."""
        ...

    def forget(self, name: str) -> None:
        """The sequence is over. Unknown names are fine."""
        ...
