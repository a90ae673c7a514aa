"""Drafts copied from where the sequence's last tokens stood before.

Prompt lookup decoding (Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding) with the
longest match that there is, as in SAM decoding (Hu et al., 2024, arXiv:2411.10666): for summaries,
edits and code, whose words are there already. They are looked for in the sequence itself and, where
there are ``PastOutputs``, in what the same tenant was answered before.

How much a match promises is counted: each token that comes shows whether a draft would have been
right, drafted or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from engine.speculation.past_outputs import END, PastOutputs
from engine.speculation.proposer import Draft, Floats
from kernels.suffix_automaton import Match, Reader, SuffixAutomaton, suffix_automaton

# Chances that a match of so many tokens goes on as it did before, until they are counted.
PROMISES = (0.0, 0.1, 0.4, 0.6, 0.8)
SHORTEST = 2
_PROMISE_WEIGHT = 4.0
_KEEP = 0.99
_LONGEST = 8  # longer ones count as such
_READ_OF_PROMPT = 16
_COUNTED = 4  # of tokens that come at once, so many show what matches promise


class PromptLookup:
    """Proposes what followed the match that promises most."""

    expects = None
    hidden_width = 0

    def __init__(self, past: PastOutputs | None = None) -> None:
        self.name = "lookup" if past is None else "history"
        self.remembers = past is not None
        self._past = past
        self._texts: dict[str, _Text] = {}
        self._own_rates, self._past_rates = _Rates(), _Rates()

    def begin(self, name: str, tokens: Sequence[int], tenant: str) -> None:
        past = () if self._past is None else self._past.texts(tenant)
        readers = tuple((each, each.reader()) for each in past)
        text = self._texts[name] = _Text(tenant, suffix_automaton(), readers, len(tokens))
        text.own.append(tokens)
        text.read(tokens[-_READ_OF_PROMPT:])

    def extend(self, name: str, tokens: Sequence[int], hidden: Floats | None = None) -> None:
        text = self._texts[name]
        for token in tokens[:_COUNTED]:
            for source, match, rates in self._matches(text):
                rates.count(match.length, source.tokens(match.after, match.after + 1) == [token])
            text.take((token,))
        text.take(tokens[_COUNTED:])

    def propose(self, most: Mapping[str, int]) -> Mapping[str, Draft]:
        return {name: self._draft(self._texts[name], number) for name, number in most.items()}

    def forget(self, name: str) -> None:
        text = self._texts.pop(name, None)
        if text is not None and self._past is not None:
            self._past.add(text.tenant, text.own.tokens(text.num_given, len(text.own)))

    def start_s(self, name: str) -> float:
        return 0.0

    def draft_s(self, longest: int) -> float:
        return 0.0

    def _draft(self, text: _Text, most: int) -> Draft:
        best = Draft()
        for source, match, rates in self._matches(text):
            confidence = rates.of(match.length)
            if confidence > best.confidence:
                best = Draft(_copied(source, match.after, most), confidence)
        return best

    def _matches(self, text: _Text) -> Iterator[tuple[SuffixAutomaton, Match, _Rates]]:
        """Those that go on."""
        match = Match(*text.own.repeat)
        if match.length >= SHORTEST:
            yield text.own, match, self._own_rates
        for source, reader in text.readers:
            match = Match(*reader.match)
            if match.length < SHORTEST:
                continue
            if source.tokens(match.after, match.after + 1) != [END]:
                yield source, match, self._past_rates


@dataclass(frozen=True, slots=True)
class _Text:
    """A sequence: its own tokens, of which it was given the first, and how it stands in others."""

    tenant: str
    own: SuffixAutomaton
    readers: tuple[tuple[SuffixAutomaton, Reader], ...]
    num_given: int

    def take(self, tokens: Sequence[int]) -> None:
        self.own.append(tokens)
        self.read(tokens)

    def read(self, tokens: Sequence[int]) -> None:
        for _, reader in self.readers:
            reader.read(tokens)


class _Rates:
    """How often matches went on as before lately, by their length."""

    def __init__(self) -> None:
        promises = PROMISES + PROMISES[-1:] * (_LONGEST + 1 - len(PROMISES))
        self._right = [promise * _PROMISE_WEIGHT for promise in promises]
        self._tried = [_PROMISE_WEIGHT] * len(promises)

    def of(self, length: int) -> float:
        length = min(length, _LONGEST)
        return self._right[length] / self._tried[length]

    def count(self, length: int, right: bool) -> None:
        length = min(length, _LONGEST)
        self._right[length] = self._right[length] * _KEEP + right
        self._tried[length] = self._tried[length] * _KEEP + 1.0


def _copied(source: SuffixAutomaton, at: int, most: int) -> tuple[int, ...]:
    """From position ``at`` on, to the end of an output; past the end of a text that is still being
    written it goes on with what it copied."""
    copied = source.tokens(at, at + most)
    period = len(source) - at
    while len(copied) < most:
        copied.append(copied[len(copied) - period])
    return tuple(copied[: copied.index(END)] if END in copied else copied)
