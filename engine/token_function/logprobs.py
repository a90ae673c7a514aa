"""Log-probabilities of the raw logits, before anything a request asks for changes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TopLogprobs = tuple[tuple[int, float], ...]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Computed in fp64, rounded to fp32; ``[vocab_size]``."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted.astype(np.float32)


def top_logprobs(logprobs: NDArray[np.float32], num_top: int) -> TopLogprobs:
    """The highest ``num_top`` as (token id, logprob), ties to the lower id; none of -Inf."""
    num_top = min(num_top, logprobs.size)
    if num_top == 0:
        return ()
    border = np.partition(logprobs, -num_top)[-num_top]
    ids = np.flatnonzero((logprobs >= border) & np.isfinite(logprobs))
    best = ids[np.argsort(-logprobs[ids], kind="stable")][:num_top]
    return tuple((int(token_id), float(logprobs[token_id])) for token_id in best)
