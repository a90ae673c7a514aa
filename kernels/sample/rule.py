"""How the tokens of one sequence are chosen: plain values, fixed while the sequence runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np
from numpy.typing import NDArray

Fp32 = NDArray[np.float32]
Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


def _no_ids() -> Ids:
    return np.empty(0, dtype=np.int32)


def _no_biases() -> Fp32:
    return np.empty(0, dtype=np.float32)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Rule:
    """One choice of one request; the default takes the highest logit.

    ``seed``, ``choice_index``  which noise: 64 bits, and 32 bits
    ``num_prompt``              tokens of the prompt; the position of the first token chosen
    ``temperature``             0 for the highest logit, else an fp32 number
    ``log_min_p``               fp32(ln(min_p)); -inf is off
    ``top_k``, ``top_p``        0 and 1 are off
    ``bias_ids``, ``biases``    ``[num_biases]``, ids once each
    ``repetition``              an fp32 number of at least 2^-126; 1 is off
    ``presence``, ``frequency`` fp32 numbers; 0 is off
    ``seen_ids``                the ids of the prompt once each; read if ``repetition`` is not 1
    ``forbidden``               ``[vocab_size]``, ids never chosen; None for none
    ``forbidden_early``         the same before ``min_tokens`` tokens were chosen
    ``num_top``                 top logprobs beside that of the token; None for no logprobs
    """

    seed: int = 0
    choice_index: int = 0
    num_prompt: int = 0
    temperature: float = 0.0
    log_min_p: float = -inf
    top_k: int = 0
    top_p: float = 1.0
    bias_ids: Ids = field(default_factory=_no_ids)
    biases: Fp32 = field(default_factory=_no_biases)
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    seen_ids: Ids = field(default_factory=_no_ids)
    forbidden: Mask | None = None
    forbidden_early: Mask | None = None
    min_tokens: int = 0
    num_top: int | None = None

    @property
    def penalizes(self) -> bool:
        """Whether the tokens chosen so far matter, not only how many they are."""
        return self.repetition != 1 or self.presence != 0 or self.frequency != 0

    def forbidden_at(self, num_output: int) -> Mask | None:
        return self.forbidden_early if num_output < self.min_tokens else self.forbidden

    @property
    def argmax_from(self) -> int | None:
        """After so many tokens the id of the highest logit, the lowest of equal ones, is all that
        choosing the next ones takes; None: never."""
        if self.temperature != 0 or self.num_top is not None or self.bias_ids.size:
            return None
        if self.penalizes or self.forbidden is not None:
            return None
        return 0 if self.forbidden_early is None else self.min_tokens


def unique_ids(ids: Sequence[int]) -> Ids:
    """Each of ``ids`` once, ascending."""
    return np.unique(np.array(ids, dtype=np.int32))
