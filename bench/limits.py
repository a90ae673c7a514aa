"""The least time a step can take here: what it must read and compute, over what the machine can do.

``limit_ratio`` is that time over the time taken. Decode reads every matrix once per step and every
sequence's keys and values; a phase takes as long as the slower of reading and computing, and phases
follow one another. Prefill uses each matrix for many rows and counts operations only, without the
LM head. Nothing is padded, and norms, embeddings, activations and sampling count for nothing, so
the ratio errs to the low side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.model import Model
from engine.model.llama import LlamaModel
from engine.model.weights import Matrices, head_matrix, layer_matrices
from kernels.peaks import Peaks


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a step that reads ``num_bytes`` and does ``num_ops`` (a multiply-add is two)."""

    num_bytes: float
    num_ops: float
    arithmetic: str

    def allowed_s(self, peaks: Peaks) -> float:
        read_s = self.num_bytes / (peaks.read_gbps * 1e9)
        return max(read_s, self.num_ops / (peaks.gops(self.arithmetic) * 1e9))


def limit_ratio(phases: Iterable[Phase], peaks: Peaks, took_s: float) -> float:
    """The share of ``took_s`` that the machine's limits allow for phases one after the other."""
    return sum(phase.allowed_s(peaks) for phase in phases) / took_s


def limit_ratios(phases: Sequence[Phase], peaks: Peaks, took_s: float) -> dict[str, float]:
    """``limit_ratio``, and, where the CPU has matrix tiles, that of its vectors alone beside it."""
    ratios = {"limit_ratio": limit_ratio(phases, peaks, took_s)}
    if peaks.int8_tiles_gops is not None:
        ratios["of_vectors"] = limit_ratio(phases, peaks.of_vectors, took_s)
    return ratios


def bytes_of(phases: Iterable[Phase]) -> int:
    return round(sum(phase.num_bytes for phase in phases))


@dataclass(frozen=True, slots=True)
class Workload:
    """What a model asks of a machine.

    ``attention_ops`` is for one query and one key over all layers. Products with weights are
    computed in ``arithmetic``, those with keys and values in ``kv_arithmetic``.
    """

    layers: Matrices
    head: Matrices
    arithmetic: str
    kv_token_bytes: int
    attention_ops: int
    kv_arithmetic: str

    def decode_step(self, batch: int, context: float) -> list[Phase]:
        """One token for each of ``batch`` sequences that attend to ``context`` keys on average."""
        keys = batch * context
        return [
            self._products(self.layers, batch),
            Phase(keys * self.kv_token_bytes, keys * self.attention_ops, self.kv_arithmetic),
            self._products(self.head, batch),
        ]

    def prefill(self, num_prompts: int, prompt: int) -> Phase:
        """All tokens of prompts of ``prompt`` tokens each; no bytes."""
        num_ops = num_prompts * prompt * self.prefill_ops_per_token(prompt)
        return Phase(0, num_ops, self.arithmetic)

    def prefill_ops_per_token(self, prompt: int) -> float:
        """Of a prompt's tokens on average; token ``i`` attends to ``i + 1`` keys."""
        return 2 * self.layers.num_weights + self.attention_ops * (prompt + 1) / 2

    def _products(self, matrices: Matrices, rows: int) -> Phase:
        return Phase(matrices.num_bytes, 2 * matrices.num_weights * rows, self.arithmetic)


def workload_of(model: Model, page_size: int) -> Workload:
    """From the weights as they were loaded; layers and head may differ in bytes per weight.

    A model that has no matrices, as the hash model, has only its pages to read.
    """
    spec = model.spec
    kv_token_bytes = spec.page_layout(page_size).token_bytes
    modes = arithmetic_of(spec.weight_mode), arithmetic_of(spec.kv_dtype)
    if not isinstance(model, LlamaModel):
        nothing = Matrices(0, 0)
        return Workload(nothing, nothing, modes[0], kv_token_bytes, 0, modes[1])
    config = model.config
    return Workload(
        layers=layer_matrices(model.weights),
        head=head_matrix(model.weights),
        arithmetic=modes[0],
        kv_token_bytes=kv_token_bytes,
        attention_ops=4 * config.num_layers * config.num_heads * config.head_dim,
        kv_arithmetic=modes[1],
    )


def arithmetic_of(mode: str) -> str:
    """The fastest arithmetic a weight mode or KV dtype could be computed in; names a peak.

    One product per weight, however many a kernel takes: inputs cut to 16 bits take two.
    """
    return mode if mode in ("fp32", "bf16") else "int8"
