"""A drafted token is chosen like a real one: by the token function, with its position's noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from engine.generation import Generation
from engine.token_function import TokenChoice, choose


def choose_drafts(
    generations: Mapping[str, Generation],
    drafts: Mapping[str, list[int]],
    names: Iterable[str],
    logits: np.ndarray,
) -> list[int]:
    """The token after each sequence's drafts so far, from ``logits [sequences, vocab_size]``; -1
    where there is none: the target will find the error itself."""
    rows = [
        generations[name].row_after(each, tuple(drafts[name]))
        for name, each in zip(names, logits, strict=True)
    ]
    return [each.token_id if isinstance(each, TokenChoice) else -1 for each in choose(rows)]
