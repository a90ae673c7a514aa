"""What a benchmark runs: how many prompts at once, how long, how often."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from engine.sampling_params import SamplingParams

PAGE_SIZE = 32
Row = dict[str, Any]
Report = Callable[[str], None]
"""Takes a line on how far it is."""


@dataclass(frozen=True, slots=True)
class Load:
    """``batch`` prompts at once of ``prompt`` tokens each, ``tokens`` generated from each."""

    batch: int
    prompt: int
    tokens: int
    repeat: int

    @property
    def pool_tokens(self) -> int:
        """Room for one repeat beside what another one generated: eviction then spares prompts."""
        return self.batch * (self.prompt + 2 * self.tokens + 4 * PAGE_SIZE)

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=self.tokens, ignore_eos=True)

    def prompts(self, vocab_size: int, repeat: int) -> list[list[int]]:
        """Token ids of one repeat; no two prompts share a page."""
        source = random.Random(f"{self.batch} prompts, repeat {repeat}")
        return [source.choices(range(vocab_size), k=self.prompt) for _ in range(self.batch)]

    def row(self, model: str, weights: str, kv: str) -> Row:
        """The settings, as the beginning of a row."""
        return {"model": model, "weights": weights, "kv": kv, **asdict(self)}
