"""The least time a step can take here: what it must read and compute, over what the machine can do.

Decode reads every weight once per step and every sequence's keys and values; a phase takes as long
as the slower of reading and computing. Prefill reuses each weight for many rows and counts
operations only, without the LM head. Nothing is padded, and norms, embeddings, activations and
sampling count for nothing, so the share of the limit errs to the low side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from bench.machine import Machine
from engine.model import Model
from engine.model.llama import LlamaModel
from engine.model.weights import WEIGHT_MODES


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a step that reads ``num_bytes`` and does ``num_ops`` (a multiply-add is two)."""

    num_bytes: float
    num_ops: float

    def allowed_s(self, machine: Machine) -> float:
        read_s = self.num_bytes / (machine.read_gbps * 1e9)
        return max(read_s, self.num_ops / (machine.fp32_gflops * 1e9))


def allowed_s(phases: Iterable[Phase], machine: Machine) -> float:
    """Seconds the machine's limits allow for phases one after the other."""
    return sum(phase.allowed_s(machine) for phase in phases)


@dataclass(frozen=True, slots=True)
class Workload:
    """What a model asks of a machine; weights are counted in elements of its matrices.

    ``attention_ops`` is for one query and one key over all layers; both weight modes multiply and
    add in fp32.
    """

    layer_weights: int
    head_weights: int
    weight_size: int
    kv_token_bytes: int
    attention_ops: int

    def decode_step(self, batch: int, context: float) -> list[Phase]:
        """One token for each of ``batch`` sequences that attend to ``context`` keys on average."""
        keys = batch * context
        return [
            self._linear(self.layer_weights, batch),
            Phase(keys * self.kv_token_bytes, keys * self.attention_ops),
            self._linear(self.head_weights, batch),
        ]

    def prefill_ops_per_token(self, prompt: int) -> float:
        """Of a prompt's tokens on average; token ``i`` attends to ``i + 1`` keys."""
        return 2 * self.layer_weights + self.attention_ops * (prompt + 1) / 2

    def _linear(self, weights: int, rows: int) -> Phase:
        return Phase(weights * self.weight_size, 2 * weights * rows)


def workload_of(model: Model, page_size: int) -> Workload:
    """A model that has no matrices, as the hash model, has only its pages to read."""
    spec = model.spec
    kv_token_bytes = spec.page_layout(page_size).token_bytes
    if not isinstance(model, LlamaModel):
        return Workload(0, 0, 0, kv_token_bytes, 0)
    config = model.config
    matrices = {name: shape for name, shape in config.shapes().items() if len(shape) == 2}
    return Workload(
        layer_weights=sum(prod(matrices[name]) for name in matrices if ".layers." in name),
        head_weights=config.vocab_size * config.hidden_size,
        weight_size=WEIGHT_MODES[spec.weight_mode].itemsize,
        kv_token_bytes=kv_token_bytes,
        attention_ops=4 * config.num_layers * config.num_heads * config.head_dim,
    )
