"""Drafts of a small head trained for the target: one layer that goes on from what the target knows.

From the hidden row that gave the last token, and that token, the head makes a state like the hidden
row to come, from it the next draft, and so on, as EAGLE does (Li et al., 2024, arXiv:2401.15077).
Prompts that were prefilled by another worker or found in a cache come without hidden rows, so the
head attends to the keys and values of the target's last layer, which lie in the sequence's pages
whoever computed them, as GliDe does (Du et al., 2024, arXiv:2402.02082). Its own keys and values
stand behind them, where the target writes its own when it verifies. Drafts are of a part of the
vocabulary, the tokens that the target writes most (FR-Spec: Zhao et al., 2025, arXiv:2502.14856).
``quire draft train`` makes one (``head_training.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from engine.errors import ModelError
from engine.generation import Generation
from engine.model import Model
from engine.model.llama import LlamaModel
from engine.speculation.choosing import choose_drafts
from engine.speculation.proposer import Draft, Floats
from kernels.decoder import (
    DecoderLayer,
    DecoderWeights,
    DraftRows,
    StateInputs,
    decoder,
    gate_up_rows,
    qkv_rows,
)
from kernels.embedding import embedding
from kernels.layout import PageLayout
from kernels.packed_matrix import PackedMatrix, pack_rotated_int8

FORMAT = "quire-draft-head-2"
EXPECTED = 0.5
_STEP = 0.1  # by how much what drafts took moves what is known
_FORGET = 0.002  # by how much a token does, back to what was measured at first
_TRIES = 5
_FAR = 4


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """``H`` is the target's width, ``A`` that of its query heads and ``B`` of its key heads
    together, ``M`` the feed-forward's own, ``V`` the number of tokens it drafts."""

    state_norm: torch.Tensor  # [H]
    token_norm: torch.Tensor  # [H]
    from_state: torch.Tensor  # [H, H]
    from_token: torch.Tensor  # [H, H]
    attention_norm: torch.Tensor  # [H]
    qkv: torch.Tensor  # [A + 2 B, H]
    out: torch.Tensor  # [H, A]
    mlp_norm: torch.Tensor  # [H]
    gate_up: torch.Tensor  # [2 M, H]
    down: torch.Tensor  # [H, M]
    out_norm: torch.Tensor  # [H]
    vocabulary: torch.Tensor  # [V] int64, ids of the target

    def check(self, target: DecoderWeights) -> None:
        """Raises ValueError unless the head fits the target."""
        width, vocab_size = target.width, target.head.outputs
        queries, keys = (n * target.head_dim for n in (target.num_heads, target.num_kv_heads))
        hidden = self.down.shape[1] if self.down.dim() == 2 else 0
        shapes = {
            "state_norm": (width,),
            "token_norm": (width,),
            "from_state": (width, width),
            "from_token": (width, width),
            "attention_norm": (width,),
            "qkv": (queries + 2 * keys, width),
            "out": (width, queries),
            "mlp_norm": (width,),
            "gate_up": (2 * hidden, width),
            "down": (width, hidden),
            "out_norm": (width,),
            "vocabulary": (self.vocabulary.numel(),),
        }
        for name, shape in shapes.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"{name} is {list(found)}, the target needs {list(shape)}")
            if not bool(getattr(self, name).isfinite().all()):
                raise ValueError(f"{name} has NaN or infinity in it")
        if not hidden:
            raise ValueError("down must have inputs")
        ids = self.vocabulary
        if not ids.numel() or int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            raise ValueError(f"vocabulary must be ids from 0 to {vocab_size - 1}")

    def decoder(self, target: DecoderWeights) -> DecoderWeights:
        """The head as a decoder of one layer, in the target's last one's place."""
        num_heads = target.num_heads + 2 * target.num_kv_heads
        layer = DecoderLayer(
            attention_norm=self.attention_norm,
            qkv=_packed(self.qkv, qkv_rows(num_heads, target.head_dim)),
            out=pack_rotated_int8(self.out),
            mlp_norm=self.mlp_norm,
            gate_up=_packed(self.gate_up, gate_up_rows(self.down.shape[1])),
            down=pack_rotated_int8(self.down),
        )
        return DecoderWeights(
            num_heads=target.num_heads,
            num_kv_heads=target.num_kv_heads,
            head_dim=target.head_dim,
            norm_eps=target.norm_eps,
            attention_scale=target.attention_scale,
            embedding=target.embedding,
            layers=(layer,),
            norm=self.out_norm,
            head=pack_rotated_int8(embedding(self.vocabulary, target.head)),
            cos=target.cos,
            sin=target.sin,
            states=StateInputs(
                state_norm=self.state_norm,
                token_norm=self.token_norm,
                from_state=pack_rotated_int8(self.from_state),
                from_token=pack_rotated_int8(self.from_token),
                ids=self.vocabulary,
                first_layer=len(target.layers) - 1,
            ),
        )


NAMES = tuple(field.name for field in fields(HeadWeights))


def _packed(weight: torch.Tensor, order: torch.Tensor) -> PackedMatrix:
    """Its rows in ``order``, -1 standing for zeros."""
    return pack_rotated_int8(torch.cat((weight, weight.new_zeros(1, weight.shape[1])))[order])


def read_head(path: Path) -> HeadWeights:
    """Raises ModelError if it is no draft head."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ModelError(f"{path.name} is no draft head ({FORMAT})")
            tensors = {name: file.get_tensor(name) for name in NAMES}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path.name} cannot be read as a draft head: {error}") from None
    floats = {name: each.to(torch.float32) for name, each in tensors.items()}
    return HeadWeights(**(floats | {"vocabulary": tensors["vocabulary"].to(torch.int64)}))


@dataclass(frozen=True, slots=True)
class SequencePages:
    """The target's pages: ``kv`` as its forward takes them, and of a sequence the slots of those it
    has, from position 0 on; none if it has no place in the pool now."""

    kv: torch.Tensor
    layout: PageLayout
    of: Callable[[str], Sequence[int]]


@dataclass(slots=True)
class _Sequence:
    last_token: int
    num_tokens: int
    hidden: Floats | None = None


class DraftHead:
    """Proposes what the head makes of a sequence, once a step has given it a hidden row.

    ``generations`` are the target's, by sequence: their token functions choose. Writes keys and
    values behind those that the target has written, as far as the sequence's pages go, and drafts
    no further.
    """

    name = "head"
    expects = EXPECTED
    remembers = False

    def __init__(
        self,
        weights: HeadWeights,
        target: Model,
        pages: SequencePages,
        generations: Mapping[str, Generation],
    ) -> None:
        """Raises ModelError if the head was made for another model's shapes, or none can be."""
        if not isinstance(target, LlamaModel):
            raise ModelError(f"{target.spec.name} has no hidden rows for a draft head")
        try:
            weights.check(target.weights)
        except ValueError as error:
            raise ModelError(f"the draft head does not fit {target.spec.name}: {error}") from None
        self.hidden_width = target.weights.width
        self._vocab_size = target.spec.vocab_size
        self._decoder = decoder(weights.decoder(target.weights))
        self._ids = weights.vocabulary.numpy()
        self._pages = pages
        self._generations = generations
        self._sequences: dict[str, _Sequence] = {}
        self._first_s = self._at_first_s = self._measured(1)
        self._next_s = max(self._measured(_FAR) - self._first_s, 0.0) / (_FAR - 1)

    def begin(self, name: str, tokens: Sequence[int], tenant: str) -> None:
        self._sequences[name] = _Sequence(tokens[-1], len(tokens))

    def extend(self, name: str, tokens: Sequence[int], hidden: Floats | None = None) -> None:
        sequence = self._sequences[name]
        sequence.last_token, sequence.hidden = tokens[-1], hidden
        sequence.num_tokens += len(tokens)
        # Else what once took long would not be tried again, and never be known to take less.
        self._first_s += _FORGET * (self._at_first_s - self._first_s)

    def forget(self, name: str) -> None:
        self._sequences.pop(name, None)

    def start_s(self, name: str) -> float:
        return 0.0

    def draft_s(self, longest: int) -> float:
        """The first finds the caches emptied by the target's weights, those after it do not."""
        return self._first_s + (longest - 1) * self._next_s

    def propose(self, most: Mapping[str, int]) -> Mapping[str, Draft]:
        """Nothing for a sequence of which no step has told a hidden row yet."""
        began = time.perf_counter()
        lengths = {
            name: length
            for name, number in most.items()
            if (length := min(number, self._room(name))) > 0
        }
        nothing = dict.fromkeys(most, Draft())
        if not lengths:
            return nothing
        names = sorted(lengths, key=lambda name: -lengths[name])
        rows, longest = self.rows(names), lengths[names[0]]
        if any(self._generations[name].needs_logits for name in names):
            drafts = self._choose(rows, names, lengths)
        else:
            numbers = [lengths[name] for name in names]
            drafts = self._decoder.draft(rows, numbers, self._pages.kv, self._pages.layout)
        expected = self.draft_s(longest)
        took = min(time.perf_counter() - began, 2 * expected)  # the machine may have been elsewhere
        self._first_s += _STEP * (took - expected)
        found = {
            name: Draft(tuple(each), EXPECTED) for name, each in zip(names, drafts, strict=True)
        }
        return nothing | found

    def _room(self, name: str) -> int:
        """As many drafts as find a place in the sequence's pages: the first is made of its last
        token and takes that one's place, the next the place behind it."""
        sequence = self._sequences[name]
        if sequence.hidden is None:
            return 0
        num_slots = len(self._pages.of(name)) * self._pages.layout.page_size
        return max(num_slots - sequence.num_tokens + 1, 0)

    def rows(self, names: Sequence[str]) -> DraftRows:
        """Where these sequences' drafts begin; a step has told of each a hidden row."""
        sequences = [self._sequences[name] for name in names]
        return DraftRows(
            tokens=[each.last_token for each in sequences],
            states=[each.hidden for each in sequences if each.hidden is not None],
            positions=[each.num_tokens - 1 for each in sequences],
            tables=[self._pages.of(name) for name in names],
        )

    def _choose(
        self, rows: DraftRows, names: Sequence[str], lengths: Mapping[str, int]
    ) -> list[list[int]]:
        """Drafts that the sequences' token functions choose, where not all take the best."""
        drafts: dict[str, list[int]] = {name: [] for name in names}
        for depth in range(lengths[names[0]]):
            longer = [name for name in names if lengths[name] > depth]
            rows = rows.first(len(longer))
            logits, states = self.run(rows)
            whole = np.full((len(longer), self._vocab_size), np.float32(-1e30))
            whole[:, self._ids] = logits
            tokens = choose_drafts(self._generations, drafts, longer, whole)
            for name, token in zip(longer, tokens, strict=True):
                drafts[name].append(token)
            # After what is no token nothing is used: whatever follows it may be drafted.
            rows = rows.after([max(token, 0) for token in tokens], [*states])
        return [drafts[name] for name in names]

    def run(self, rows: DraftRows) -> tuple[Floats, Floats]:
        """The logits ``[B, V]`` after these rows, and their states ``[B, H]``."""
        states = np.empty((len(rows.states), self.hidden_width), dtype=np.float32)
        batch = rows.batch(best_only=False, hidden=states)
        logits = self._decoder.forward(batch, self._pages.kv, self._pages.layout)
        assert not isinstance(logits, list)
        return logits.numpy(), states

    def _measured(self, number: int) -> float:
        """Seconds of so many drafts of one sequence, the best of a few; writes into the pool's
        first page."""
        row = DraftRows([0], [np.ones(self.hidden_width, dtype=np.float32)], [0], [[0]])
        times = []
        for _ in range(_TRIES):
            began = time.perf_counter()
            self._decoder.draft(row, [number], self._pages.kv, self._pages.layout)
            times.append(time.perf_counter() - began)
        return min(times)
