"""Chance that depends on what it is asked about, not on how often it was asked before.

A stream of random numbers would give every message another delay as soon as one fault is left out;
then a failing history could not be shrunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import xxhash


@dataclass(frozen=True, slots=True)
class Chance:
    """Numbers from 0 to 1 by name."""

    seed: int

    def __call__(self, *what: object) -> float:
        return xxhash.xxh3_64_intdigest(repr(what).encode(), self.seed) / 2**64

    def between(self, low: float, high: float, *what: object) -> float:
        return low + (high - low) * self(*what)
