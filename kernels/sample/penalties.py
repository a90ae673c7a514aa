"""What a rule does to single logits: bias, repetition, presence, frequency.

Every operation is fp32 and rounded by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kernels.sample.rule import Fp32, Ids, Rule

LARGEST = np.finfo(np.float32).max


def penalize(logits: Fp32, rule: Rule, output_ids: Sequence[int]) -> Fp32:
    """New logits ``[vocab_size]``; what overflows ends at the largest number.

    In this order: ``+ bias``; for ids in prompt or output, positive logits ``/ repetition`` and
    others ``* repetition`` (CTRL, Keskar et al. 2019); for ids in the output,
    ``- frequency * count``, then ``- presence``.
    """
    logits = logits.copy()
    logits[rule.bias_ids] += rule.biases
    if rule.penalizes:
        ids, counts = np.unique(np.array(output_ids, dtype=np.int32), return_counts=True)
        _penalize_repetition(logits, np.union1d(rule.seen_ids, ids), rule.repetition)
        logits[ids] -= np.float32(rule.frequency) * counts.astype(np.float32)
        logits[ids] -= np.float32(rule.presence)
    return np.clip(logits, -LARGEST, LARGEST, out=logits)


def _penalize_repetition(logits: Fp32, ids: Ids, repetition: float) -> None:
    seen = logits[ids]
    logits[ids] = np.where(seen > 0, seen / np.float32(repetition), seen * np.float32(repetition))
