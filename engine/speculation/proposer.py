"""What makes drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


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

    def begin(self, name: str, tokens: Sequence[int], tenant: str) -> None:
        """A new sequence, with its prompt and the output it has already."""
        ...

    def extend(self, name: str, tokens: Sequence[int]) -> None:
        """Tokens were chosen."""
        ...

    def propose(self, name: str, most: int) -> Draft:
        """At most ``most`` tokens after all that the sequence has."""
        ...

    def forget(self, name: str) -> None:
        """The sequence is over. Unknown names are fine."""
        ...
