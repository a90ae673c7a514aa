"""Drafts copied from where the sequence's last tokens stood before, in its prompt or its output.

Prompt lookup decoding (Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding): for summaries,
edits and code, whose words are there already. A table from the last few tokens to the position
after their latest occurrence makes a lookup one step, however long the sequence is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.speculation.proposer import Draft

# The lengths of a match that are tried, longest first, and how much each promises at first.
CONFIDENCE = {4: 0.8, 3: 0.6, 2: 0.4}
SHORTEST = min(CONFIDENCE)


class PromptLookup:
    """Proposes what followed the longest match that it has a table for."""

    name = "lookup"
    seconds_per_token = 0.0
    expects = None

    def __init__(self) -> None:
        self._known: dict[str, _Index] = {}

    def begin(self, name: str, tokens: Sequence[int], tenant: str) -> None:
        self._known[name] = _Index()
        self._known[name].extend(tokens)

    def extend(self, name: str, tokens: Sequence[int]) -> None:
        self._known[name].extend(tokens)

    def propose(self, most: Mapping[str, int]) -> Mapping[str, Draft]:
        return {name: self._known[name].draft(number) for name, number in most.items()}

    def forget(self, name: str) -> None:
        self._known.pop(name, None)


class _Index:
    """Where in ``tokens`` what followed every run of a few tokens begins, the latest of all."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """The run that ends with the very last token has no successor yet: it is not entered."""
        known = self._tokens
        for token in tokens:
            for length in CONFIDENCE:
                if len(known) >= length:
                    self._after[tuple(known[-length:])] = len(known)
            known.append(token)

    def draft(self, most: int) -> Draft:
        for length, confidence in CONFIDENCE.items():
            at = self._after.get(tuple(self._tokens[-length:]))
            if at is not None and len(self._tokens) >= length:
                return Draft(self._copied(at, most), confidence)
        return Draft()

    def _copied(self, at: int, most: int) -> tuple[int, ...]:
        """From position ``at`` on; past the end of the tokens it goes on with what it copied."""
        copied = self._tokens[at : at + most]
        period = len(self._tokens) - at
        while len(copied) < most:
            copied.append(copied[len(copied) - period])
        return tuple(copied)
