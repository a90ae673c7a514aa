"""How many drafts are worth their rows: the most tokens per second, from what steps take here.

A step of ``n`` rows takes ``StepTimes.seconds(n)`` and its attention, measured on this machine with
this model; a sequence whose drafts are right with probability ``a`` gains ``a`` of a token from the
first, ``a^2`` from the second. Rows go where the next one gains most, and as many of them as make
expected tokens over expected time largest, which may be none: the goodput rule of SmartSpec (Liu et
al., 2024, arXiv:2406.14066). Time changes which drafts are verified, never a token.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

# What a rate remembers: a verified draft counts a tenth less with every one after it; without
# drafts it returns to what the proposer promises, so that a sequence is tried again some day.
_KEEP, _KEEP_IDLE = 0.9, 0.98
# A proposer's word on one draft counts as two drafts tried; what came of all its drafts is more:
# sequences differ by less than luck makes of a few drafts.
WORD_WEIGHT, USUAL_WEIGHT = 2.0, 12.0
# Drafts that promise less are not made: what they take beside the step is not all measured.
LEAST_GAIN = 0.05
# A draft that is right less often is not worth looking at.
_LEAST_CHANCE = 0.02
# By how much a measured step moves what is known of all steps, and of those with so many rows.
_STEP, _OWN_STEP = 0.05, 0.01


@dataclass(slots=True)
class Acceptance:
    """How often a sequence's drafts were right lately."""

    right: float = 0.0
    tried: float = 0.0

    def rate(self, confidence: float, weight: float = WORD_WEIGHT) -> float:
        """The chance that a draft is right whose predecessors were; ``confidence`` is what was
        expected, which counts as ``weight`` drafts tried."""
        return (self.right + weight * confidence) / (self.tried + weight)

    def verified(self, num_drafts: int, num_right: int) -> None:
        """Of the drafts after the first wrong one nothing is known."""
        self.right = self.right * _KEEP + num_right
        self.tried = self.tried * _KEEP + num_right + (num_right < num_drafts)

    def idle(self, num_steps: int = 1) -> None:
        """Steps without drafts."""
        self.right *= _KEEP_IDLE**num_steps
        self.tried *= _KEEP_IDLE**num_steps


class StepTimes:
    """Seconds of a decode step by its number of rows, and of attention by rows and context; between
    measured numbers of rows a straight line.

    Where steps take longer than measured, all of them are taken to do so in proportion. On a busy
    machine they do.

    Without numpy: it runs between two steps, when no cache has anything of numpy's.
    """

    def __init__(
        self, measured: Mapping[int, float], per_token: Mapping[int, float] | None = None
    ) -> None:
        """``measured``: seconds by rows without any context, at least one. No step counts as longer
        than one of more rows: whatever held it up was not its rows. ``per_token``: the seconds that
        a token of context adds, by the rows of the sequence that has it."""
        self._rows = sorted(measured)
        self._own = [measured[rows] for rows in self._rows]
        self._factor = 1.0
        self._update()
        self._per_token = _by_rows(per_token or {})

    def seconds(self, num_rows: int, attention_s: float = 0.0) -> float:
        """``attention_s`` is the sum of what ``attention_s`` says of each sequence."""
        return self._factor * (_between(self._rows, self._seconds, num_rows) + attention_s)

    def attention_s(self, num_rows: int, context: int) -> float:
        """What the context of a sequence adds that has so many rows, if the machine is as fast as
        it was when it was measured."""
        return context * self._per_token[min(num_rows, len(self._per_token) - 1)]

    def learn(self, num_rows: int, seconds: float, attention_s: float = 0.0) -> None:
        """A step took that long. All numbers move, as machines get busy; and the nearest once more:
        between two drafts a step takes longer than the measurement's."""
        known = self.seconds(num_rows, attention_s)
        error = min(seconds, 2 * known) - known  # the machine may have been elsewhere
        nearest = self._nearest(num_rows)
        self._own[nearest] += _OWN_STEP * error / self._factor
        self._update()
        self._factor *= 1 + _STEP * error / known if known else 1

    def _nearest(self, num_rows: int) -> int:
        rows = self._rows
        after = min(bisect_left(rows, num_rows), len(rows) - 1)
        return after - (after > 0 and num_rows - rows[after - 1] <= rows[after] - num_rows)

    def _update(self) -> None:
        self._seconds = list(accumulate(reversed(self._own), min))[::-1]


def _between(rows: Sequence[int], seconds: Sequence[float], num_rows: int) -> float:
    """On the line through measured points; beyond the last one in proportion to it."""
    after = bisect_left(rows, num_rows)
    if after == len(rows):
        return seconds[-1] * num_rows / rows[-1]
    if after == 0:
        return seconds[0]
    share = (num_rows - rows[after - 1]) / (rows[after] - rows[after - 1])
    return seconds[after - 1] + share * (seconds[after] - seconds[after - 1])


def _by_rows(per_token: Mapping[int, float]) -> list[float]:
    """For 0, 1, 2, ... rows of a sequence, to the most measured; more rows never take less."""
    rows = sorted(per_token)
    seconds = list(accumulate((max(per_token[each], 0.0) for each in rows), max))
    return [0.0, *(_between(rows, seconds, each) for each in range(1, max(rows, default=0) + 1))]


def _expected(rate: float, most: int, shape: Sequence[float]) -> float:
    """Of so many drafts in a row, each right with this chance if those before it were, how many are
    right."""
    total, right = 0.0, 1.0
    for factor in shape[:most]:
        right *= min(rate * factor, 1.0)
        total += right
    last = min(rate * shape[-1], 1.0) if shape else rate
    more = max(most - len(shape), 0)
    return total + right * (more if last >= 1 else last * (1 - last**more) / (1 - last))


@dataclass(frozen=True, slots=True)
class Lengths:
    """How many drafts of each sequence to verify, and the seconds that saves with every token."""

    each: list[int]
    saved_s: float


def best_lengths(
    rates: Sequence[float],
    most: Sequence[int],
    num_tokens: int,
    num_rows: int,
    times: StepTimes,
    draft_s: Callable[[int], float] = lambda longest: 0.0,
    contexts: Sequence[int] = (),
    attention_s: float = 0.0,
    shape: Sequence[float] = (),
) -> Lengths:
    """For a step that brings ``num_tokens`` with ``num_rows`` rows and ``attention_s`` anyway.

    ``rates`` are the chances that a draft is right, ``most`` how many there are or may be; making
    them takes ``draft_s(longest)``. ``contexts`` are the sequences' tokens, none if not given.
    ``shape`` is by how much the chance differs at the first, second, ... position of a draft; the
    last one counts for all behind it.
    """
    lengths, best = [0] * len(rates), [0] * len(rates)
    tokens = float(num_tokens)
    most_tokens = tokens + sum(
        _expected(rate, number, shape) for rate, number in zip(rates, most, strict=True)
    )
    without = times.seconds(num_rows, attention_s) / tokens
    least = (1 - LEAST_GAIN) * without

    def chance(index: int) -> float:
        """Of a sequence's next draft to be right."""
        if not shape:
            return rates[index]
        return min(rates[index] * shape[min(lengths[index], len(shape) - 1)], 1.0)

    gains = [(-chance(index), index) for index in range(len(rates)) if most[index] > 0]
    heapq.heapify(gains)
    rows, longest = num_rows, 0
    while gains:
        gain, index = heapq.heappop(gains)
        lengths[index] += 1
        if contexts:
            before, now = lengths[index], lengths[index] + 1  # rows
            attention_s -= times.attention_s(before, contexts[index])
            attention_s += times.attention_s(now, contexts[index])
        longest = max(longest, lengths[index])
        rows += 1
        tokens -= gain
        took = times.seconds(rows, attention_s) + draft_s(longest)
        if took >= least * most_tokens:  # nor would more rows be, whatever they brought
            break
        if took < least * tokens:
            least = took / tokens
            best = lengths.copy()
        if lengths[index] < most[index] and -(gain := gain * chance(index)) > _LEAST_CHANCE:
            heapq.heappush(gains, (gain, index))
    return Lengths(best, without - least if any(best) else 0.0)
