"""Drafts of a smaller or cheaper model: another one, or the target's own weights in fewer bits.

Speculative decoding (Leviathan et al., 2023, arXiv:2211.17192), with the token function in the
place of rejection sampling: the draft model's tokens are chosen by the target's own token function
with the noise of their positions, so sampled drafts agree with the target as often as the two
distributions let them. It keeps keys and values of its own in a pool of its own; what it computed
for drafts that were right it keeps, the rest is overwritten.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from engine.generation import Generation
from engine.model import Model
from engine.plan import PlannedRows
from engine.ragged_rows import ragged_batch
from engine.speculation.choosing import choose_drafts
from engine.speculation.measure import measure_steps
from engine.speculation.proposer import Draft, Floats
from kernels.ragged import Said
from kvstore.memory import PageMemory
from kvstore.pool import PagePool

EXPECTED = 0.7
CHUNK_ROWS = 256
# By how much a measured step moves what is known.
_STEP = 0.1


@dataclass(slots=True)
class _Sequence:
    """``fed`` are the tokens whose keys and values stand in ``pages``; of them those up to
    ``num_agreed`` are known to be the sequence's own."""

    tokens: list[int]
    fed: list[int] = field(default_factory=list)
    num_agreed: int = 0
    pages: list[int] = field(default_factory=list)

    def drop_wrong(self) -> None:
        """Forgets what was fed and is not in the sequence, and its last token: it is fed anew."""
        pairs = zip(self.fed[self.num_agreed :], self.tokens[self.num_agreed :], strict=False)
        self.num_agreed += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.num_agreed = min(self.num_agreed, len(self.tokens) - 1)
        del self.fed[self.num_agreed :]


class DraftModel:
    """Proposes what the draft model would write. Its tokens must be those of the target.

    ``generations`` are the target's, by sequence: their token functions choose.
    """

    name = "model"
    expects = EXPECTED
    remembers = False
    hidden_width = 0

    def __init__(
        self,
        model: Model,
        num_pages: int,
        page_size: int,
        generations: Mapping[str, Generation],
    ) -> None:
        self._model = model
        self._layout = model.spec.page_layout(page_size)
        self._memory = PageMemory(self._layout, num_pages)
        self.pool = PagePool(num_pages, page_size, time.monotonic)
        self._generations = generations
        self._sequences: dict[str, _Sequence] = {}
        seconds = measure_steps(model, self._memory.kv, self._layout)
        self._seconds_per_token = seconds[1]
        self._seconds_per_row = seconds[max(seconds)] / max(seconds)

    def begin(self, name: str, tokens: Sequence[int], tenant: str) -> None:
        self._sequences[name] = _Sequence(list(tokens))

    def extend(self, name: str, tokens: Sequence[int], hidden: Floats | None = None) -> None:
        self._sequences[name].tokens += tokens

    def forget(self, name: str) -> None:
        sequence = self._sequences.pop(name, None)
        if sequence is not None:
            self.pool.release(sequence.pages, name)

    def start_s(self, name: str) -> float:
        sequence = self._sequences[name]
        return (len(sequence.tokens) - 1 - sequence.num_agreed) * self._seconds_per_row

    def draft_s(self, longest: int) -> float:
        return longest * self._seconds_per_token

    def propose(self, most: Mapping[str, int]) -> Mapping[str, Draft]:
        """Nothing for a sequence that finds no pages."""
        left = {name: number for name, number in most.items() if self._fits(name, number)}
        drafts: dict[str, list[int]] = {name: [] for name in left}
        self._catch_up(left)
        while left:
            tokens = self._next_tokens(drafts, left)
            for name, token_id in tokens.items():
                drafts[name].append(token_id)
            left = {
                name: most[name]
                for name, token_id in tokens.items()
                if token_id >= 0 and len(drafts[name]) < most[name]
            }
        return {name: Draft(tuple(tokens), EXPECTED) for name, tokens in drafts.items()}

    def _fits(self, name: str, most: int) -> bool:
        sequence = self._sequences[name]
        missing = self.pool.pages_for(len(sequence.tokens) + most) - len(sequence.pages)
        slots = self.pool.allocate(max(missing, 0), name)
        sequence.pages += slots or ()
        return slots is not None

    def _catch_up(self, names: Mapping[str, int]) -> None:
        """Feeds all tokens of the sequences but the last ones."""
        for name in names:
            sequence = self._sequences[name]
            sequence.drop_wrong()
            end = len(sequence.tokens) - 1
            for start in range(len(sequence.fed), end, CHUNK_ROWS):
                chunk = sequence.tokens[start : min(start + CHUNK_ROWS, end)]
                self._forward({name: chunk}, wants_logits=False)

    def _next_tokens(
        self, drafts: Mapping[str, list[int]], names: Mapping[str, int]
    ) -> dict[str, int]:
        """Feeds each sequence's last token or draft; what the token function makes of it."""
        last = {name: (drafts[name] or self._sequences[name].tokens)[-1:] for name in names}
        began = time.perf_counter()
        best_only = not any(self._generations[name].needs_logits for name in names)
        found = self._forward(last, wants_logits=True, best_only=best_only)
        if isinstance(found, list):
            ids = found
        else:
            ids = choose_drafts(self._generations, drafts, names, found.numpy())
        took = time.perf_counter() - began
        self._seconds_per_token += _STEP * (took - self._seconds_per_token)
        return dict(zip(names, ids, strict=True))

    def _forward(
        self, tokens: Mapping[str, list[int]], *, wants_logits: bool, best_only: bool = False
    ) -> Said:
        rows = []
        for name, each in tokens.items():
            sequence = self._sequences[name]
            start = len(sequence.fed)
            sequence.fed += each
            pages = tuple(sequence.pages[: self.pool.pages_for(len(sequence.fed))])
            rows.append(PlannedRows(name, start, tuple(each), pages, wants_logits))
        batch = ragged_batch(rows, best_only)
        return self._model.forward(batch, self._memory.kv, self._layout)
