"""Drafts of a small head trained for the target, on what the target's last layer made of a token.

From the hidden row that gave the last token, and that token, the head makes a state like the hidden
row to come, from it the next draft, and so on: a recurrent drafter (Cheng et al., 2024,
arXiv:2403.09919) whose steps see the tokens drafted before, as in Hydra (Ankner et al., 2024,
arXiv:2402.05109). Unlike EAGLE (Li et al., 2024, arXiv:2401.15077) it attends to nothing: prompts
that were prefilled by another worker or found in a cache come without hidden rows. Drafts are of a
part of the vocabulary, the tokens that the target writes most (FR-Spec: Zhao et al., 2025,
arXiv:2502.14856). ``quire draft train`` makes one (``head_training.py``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from engine.errors import ModelError
from engine.generation import Generation
from engine.model import Model
from engine.model.llama import LlamaModel
from engine.speculation.choosing import choose_drafts
from engine.speculation.proposer import Draft
from kernels.embedding import embedding
from kernels.linear import linear
from kernels.packed_matrix import PackedMatrix, pack_rotated_int8
from kernels.rms_norm import rms_norm
from kernels.silu_mul import silu_mul

FORMAT = "quire-draft-head-1"
EXPECTED = 0.5
_STEP = 0.1  # by how much a measured step moves what is known
_TRIES = 5


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """``H`` is the target's width, ``M`` the head's own, ``V`` the number of tokens it drafts."""

    state_norm: torch.Tensor  # [H]
    token_norm: torch.Tensor  # [H]
    inner: torch.Tensor  # [2 M + H, 2 H]: gate, up, and what is added to the layer's output
    outer: torch.Tensor  # [H, M]
    out_norm: torch.Tensor  # [H]
    vocabulary: torch.Tensor  # [V] int32, ids of the target

    def check(self, width: int, vocab_size: int) -> None:
        """Raises ValueError unless the head fits a target of that width and vocabulary."""
        hidden = self.outer.shape[1] if self.outer.dim() == 2 else 0
        shapes = {
            "state_norm": (width,),
            "token_norm": (width,),
            "inner": (2 * hidden + width, 2 * width),
            "outer": (width, hidden),
            "out_norm": (width,),
            "vocabulary": (self.vocabulary.numel(),),
        }
        for name, shape in shapes.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"{name} is {list(found)}, the target needs {list(shape)}")
            if not bool(getattr(self, name).isfinite().all()):
                raise ValueError(f"{name} has NaN or infinity in it")
        ids = self.vocabulary
        if not ids.numel() or int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            raise ValueError(f"vocabulary must be ids from 0 to {vocab_size - 1}")


NAMES = ("state_norm", "token_norm", "inner", "outer", "out_norm", "vocabulary")


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


@dataclass(slots=True)
class _Sequence:
    last_token: int
    hidden: torch.Tensor | None = None


class DraftHead:
    """Proposes what the head makes of a sequence, once a step has given it a hidden row.

    ``generations`` are the target's, by sequence: their token functions choose.
    """

    name = "head"
    expects = EXPECTED

    def __init__(
        self, weights: HeadWeights, target: Model, generations: Mapping[str, Generation]
    ) -> None:
        """Raises ModelError if the head was made for another model's shapes, or none can be."""
        if not isinstance(target, LlamaModel):
            raise ModelError(f"{target.spec.name} has no hidden rows for a draft head")
        self.hidden_width = target.weights.width
        self._vocab_size = target.spec.vocab_size
        try:
            weights.check(self.hidden_width, self._vocab_size)
        except ValueError as error:
            raise ModelError(f"the draft head does not fit {target.spec.name}: {error}") from None
        self._weights = weights
        self._eps = target.weights.norm_eps
        self._embedding = target.weights.embedding
        self._inner = pack_rotated_int8(weights.inner)
        self._outer = pack_rotated_int8(weights.outer)
        self._head = head_rows(target.weights.head, weights.vocabulary)
        self._ids = weights.vocabulary.numpy()
        self._generations = generations
        self._sequences: dict[str, _Sequence] = {}
        self.seconds_per_token = self._measured()

    def begin(self, name: str, tokens: Sequence[int], tenant: str) -> None:
        self._sequences[name] = _Sequence(tokens[-1])

    def extend(self, name: str, tokens: Sequence[int], hidden: torch.Tensor | None = None) -> None:
        sequence = self._sequences[name]
        sequence.last_token, sequence.hidden = tokens[-1], hidden

    def forget(self, name: str) -> None:
        self._sequences.pop(name, None)

    def start_s(self, name: str) -> float:
        return 0.0

    def propose(self, most: Mapping[str, int]) -> Mapping[str, Draft]:
        """Nothing for a sequence of which no step has told a hidden row yet."""
        states = {
            name: hidden for name in most if (hidden := self._sequences[name].hidden) is not None
        }
        tokens = {name: self._sequences[name].last_token for name in states}
        drafts: dict[str, list[int]] = {name: [] for name in states}
        while states:
            began = time.perf_counter()
            rows, logits = self._forward(torch.stack([*states.values()]), [*tokens.values()])
            chosen = self._choose(drafts, [*states], logits)
            took = time.perf_counter() - began
            self.seconds_per_token += _STEP * (took - self.seconds_per_token)
            found = zip(states, rows, chosen, strict=True)
            states, tokens = {}, {}
            for name, state, token in found:
                if token >= 0:
                    drafts[name].append(token)
                    if len(drafts[name]) < most[name]:
                        states[name], tokens[name] = state, token
        return {name: Draft(tuple(each), EXPECTED) for name, each in drafts.items()}

    def _forward(
        self, states: torch.Tensor, tokens: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States ``[B, H]`` and tokens that follow them: next states, and logits ``[B, V]``."""
        weights, width = self._weights, self._outer.inputs
        rows = embedding(torch.tensor(tokens), self._embedding)
        both = torch.cat(
            (
                rms_norm(states, weights.state_norm, self._eps),
                rms_norm(rows, weights.token_norm, self._eps),
            ),
            dim=1,
        )
        inner = linear(both, self._inner)
        gate, up = inner[:, :width].contiguous(), inner[:, width : 2 * width].contiguous()
        states = inner[:, 2 * width :] + linear(silu_mul(gate, up), self._outer)
        return states, linear(rms_norm(states, weights.out_norm, self._eps), self._head)

    def _choose(
        self, drafts: Mapping[str, list[int]], names: list[str], logits: torch.Tensor
    ) -> list[int]:
        if not any(self._generations[name].needs_logits(len(drafts[name]) + 1) for name in names):
            best: list[int] = self._ids[logits.argmax(dim=1).numpy()].tolist()
            return best
        whole = np.full((len(names), self._vocab_size), np.float32(-1e30))
        whole[:, self._ids] = logits.numpy()
        return choose_drafts(self._generations, drafts, names, whole)

    def _measured(self) -> float:
        """Seconds of a step of one row, the best of a few."""
        state = torch.ones(1, self.hidden_width)
        times = []
        for _ in range(_TRIES):
            began = time.perf_counter()
            self._forward(state, [0])
            times.append(time.perf_counter() - began)
        return min(times)


def head_rows(head: PackedMatrix, ids: torch.Tensor) -> PackedMatrix:
    """The rows of the target's LM head that stand for these tokens."""
    return pack_rotated_int8(embedding(ids, head))
