"""What one simulation does: settings, requests and faults, drawn from a seed or read from JSON."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

PROMPTS = tuple(tuple(random.Random(f"prompt {number}").randbytes(160)) for number in range(4))
"""Requests take prefixes of a few texts, so that they meet in the prefix caches."""

PAGE_SIZE = 16
MAX_OUTPUT = 18
SEED = 7
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Setup:
    """How many services there are, how small everything is, how slow the network."""

    num_prefill: int
    num_decode: int
    prefill_pages: int
    decode_pages: int
    max_sequences: int
    chunk_tokens: int
    min_remote_tokens: int
    lease_s: float
    handover_idle_s: float
    max_prompts: int
    swap_pages: int
    max_latency_s: float
    max_step_s: float
    num_layer_groups: int
    prefer: str = "remote"
    page_lease_s: float = 10.0
    drain_s: float = 0.5
    clocks_differ: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """A client's request: the first ``num_prompt`` tokens of a text, at a time, with limits."""

    at: float
    text: int
    num_prompt: int
    max_tokens: int
    choices: int = 1
    temperature: float = 0.0
    timeout_s: float = PATIENCE_S
    leaves_s: float | None = None
    decode: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """Something goes wrong; which fields count depends on ``kind``.

    ============  =====================================================================
    crash         ``node`` dies at ``at`` and is started again ``seconds`` later
    freeze        ``node`` stands still from ``at`` for ``seconds``
    no_index      the page index answers nobody from ``at`` for ``seconds``
    empty_index   the page index forgets everything at ``at``
    unheard       the page index does what it is told, from ``at`` for ``seconds``, and no
                  answer comes back
    cut           the connection of call number ``call`` of route ``node`` breaks instead
                  of message ``message`` (0 is the request)
    silence       from that message on nothing comes, for ``seconds``
    late          that message comes ``seconds`` late, and all after it
    twice         that message comes twice
    swap          that message comes after the next
    flip          bit ``bit`` of that message is flipped
    drain         ``node`` is told to go at ``at``, and started again ``seconds`` after its end
    set_clock     the wall clock of ``node`` is set ``seconds`` ahead at ``at``
    bad_swap      page number ``call`` that comes back from swap is damaged in bit ``bit``
    again         a copy of the request of that call, ``seconds`` after it, by nobody in
                  particular; ``bit`` is added to its attempt
    ============  =====================================================================
    """

    kind: str
    node: str = ""
    at: float = 0.0
    seconds: float = 0.0
    call: int = 0
    message: int = 0
    bit: int = 0


@dataclass(frozen=True, slots=True)
class Scenario:
    seed: int
    setup: Setup
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        found: dict[str, Any] = json.loads(text)
        return cls(
            seed=found["seed"],
            setup=Setup(**found["setup"]),
            asks=tuple(Ask(**ask) for ask in found["asks"]),
            faults=tuple(Fault(**fault) for fault in found["faults"]),
        )

    def without_asks(self, start: int, end: int) -> Scenario:
        return replace(self, asks=self.asks[:start] + self.asks[end:])

    def without_faults(self, start: int, end: int) -> Scenario:
        return replace(self, faults=self.faults[:start] + self.faults[end:])
