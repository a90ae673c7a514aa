from __future__ import annotations

from collections.abc import Sequence

from kernels import _native
from kernels.sample import Row, Tokens, empty_tokens


def sample(rows: Sequence[Row]) -> Tokens:
    tokens = empty_tokens(rows)
    logits, rules, output_ids = zip(*rows, strict=True) if rows else ((), (), ())
    _native.sample(logits, rules, output_ids, *tokens)
    return tokens
