"""Philox4x32-10, the counter-based random function of Salmon, Moraes, Dror and Shaw,
"Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

A pure function of (counter, key): no state, so any word can be had at any time on any machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 10
WORDS_PER_BLOCK = 4

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counters: NDArray[np.uint64], key: int) -> NDArray[np.uint32]:
    """Four random words for each counter.

    ``counters``: ``[4, num_blocks]``, words of 32 bits held in uint64. ``key``: 64 bits, key word 0
    being the low half. Returns ``[4, num_blocks]`` uint32.
    """
    c0, c1, c2, c3 = counters
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(NUM_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (p1 >> _HALF) ^ (c1 ^ np.uint64(k0))
        c1 = p1 & _LOW
        c2 = (p0 >> _HALF) ^ (c3 ^ np.uint64(k1))
        c3 = p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def token_words(
    seed: int, position: int, choice_index: int, ids: NDArray[np.intp]
) -> NDArray[np.uint32]:
    """The random word of each token id at one position of one choice.

    ``ids``: ``[num_ids]``, ascending, not empty. Returns ``[num_ids]``: word ``id % 4`` of the
    block with counter ``(id // 4, position, choice_index, 0)`` and the seed as key.
    """
    last_block = int(ids[-1]) // WORDS_PER_BLOCK
    if ids.size > last_block:  # many ids per block: each block once
        words = _blocks(seed, position, choice_index, np.arange(last_block + 1))
        return words.T.reshape(-1)[ids]
    words = _blocks(seed, position, choice_index, ids // WORDS_PER_BLOCK)
    return words[ids % WORDS_PER_BLOCK, np.arange(ids.size)]


def _blocks(
    seed: int, position: int, choice_index: int, blocks: NDArray[np.intp]
) -> NDArray[np.uint32]:
    counters = np.zeros((WORDS_PER_BLOCK, blocks.size), dtype=np.uint64)
    counters[0] = blocks
    counters[1] = position
    counters[2] = choice_index
    return philox4x32(counters, seed)
