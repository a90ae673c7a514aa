"""What sampling parameters do to single logits: bias, repetition, presence, frequency.

Every operation is fp32 and rounded by itself; parameters are rounded to fp32 first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.sampling_params import SamplingParams

Fp32 = NDArray[np.float32]

LARGEST = np.finfo(np.float32).max
SMALLEST_NORMAL = np.finfo(np.float32).tiny


class Penalties:
    """Adjusts the logits of a sequence with a fixed prompt."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self._bias_ids = np.array(list(params.logit_bias), dtype=np.intp)
        self._biases = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self._repetition = max(np.float32(params.repetition_penalty), SMALLEST_NORMAL)
        self._presence = np.float32(params.presence_penalty)
        self._frequency = np.float32(params.frequency_penalty)
        self._repeats = params.repetition_penalty != 1
        self._counts = params.presence_penalty != 0 or params.frequency_penalty != 0
        self._prompt_ids = np.unique(np.array(prompt_ids, dtype=np.intp))

    @property
    def change_nothing(self) -> bool:
        return not (self._bias_ids.size or self._repeats or self._counts)

    def apply(self, logits: Fp32, output_ids: Sequence[int]) -> None:
        """Changes ``logits`` ``[vocab_size]`` in place; what overflows ends at the largest number.

        In this order: ``+ bias``; for ids in prompt or output, positive logits ``/ repetition`` and
        others ``* repetition`` (CTRL, Keskar et al. 2019); for ids in the output,
        ``- frequency * count``, then ``- presence``.
        """
        logits[self._bias_ids] += self._biases
        if self._repeats or self._counts:
            ids, counts = np.unique(np.array(output_ids, dtype=np.intp), return_counts=True)
            if self._repeats:
                self._penalize_repetition(logits, np.union1d(self._prompt_ids, ids))
            logits[ids] -= self._frequency * counts.astype(np.float32)
            logits[ids] -= self._presence
        np.clip(logits, -LARGEST, LARGEST, out=logits)

    def _penalize_repetition(self, logits: Fp32, ids: NDArray[np.intp]) -> None:
        seen = logits[ids]
        logits[ids] = np.where(seen > 0, seen / self._repetition, seen * self._repetition)
