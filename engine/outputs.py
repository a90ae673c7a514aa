"""What a step has to tell, addressed to sequences by name."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import QuireError
from engine.finish import FinishReason
from engine.plan import Reservation
from kvstore.page import PageIdentity


@dataclass(frozen=True, slots=True)
class Admitted:
    """The sequence has its pages; ``cached_tokens`` were here already."""

    name: str
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """Pages are reserved for a handover; ``generations`` belong to the reservation's slots."""

    reservation: Reservation
    generations: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.reservation.name


@dataclass(frozen=True, slots=True)
class ChunkDone:
    """Rows of a prompt went through the model; times are those of ``engine.telemetry.clock``."""

    name: str
    start: int
    num_tokens: int
    started_ns: int
    ended_ns: int


@dataclass(frozen=True, slots=True)
class PagesComing:
    """Pages of a prefill sequence, in order; a read of each has begun on the receiver's behalf.

    Their first ``n`` layers are final once the engine's ``LayerProgress`` has counted ``base + n``.
    """

    name: str
    pages: tuple[PageIdentity, ...]
    base: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """All pages of a prefill sequence are finished, and leased under its name."""

    name: str


@dataclass(frozen=True, slots=True)
class Lent:
    """Cached pages are leased under the name, or fewer than asked for: ``refusal`` says why."""

    name: str
    pages: tuple[PageIdentity, ...]
    refusal: str


@dataclass(frozen=True, slots=True)
class Preempted:
    """The sequence gave its pages to others and waits to be computed again."""

    name: str


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One new token; ``text`` may lag behind. ``finish`` is set with the last token.

    ``num_drafts`` were verified by the pass that brought it, told with the pass's first token;
    ``drafted`` tokens took no pass of their own.
    """

    name: str
    token_id: int
    text: str
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    finish: FinishReason | None
    matched_stop: str | int | None
    num_drafts: int = 0
    drafted: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """The sequence ended with an error and is gone."""

    name: str
    error: QuireError


Output = (
    Admitted
    | Reserved
    | ChunkDone
    | PagesComing
    | Prefilled
    | Lent
    | Preempted
    | TokenOutput
    | Failed
)


@dataclass(frozen=True, slots=True)
class StepStats:
    """What steps did and cost: one step, or a sum of them.

    ``step_bytes`` is what they had to read of weights and KV (design, law 8); prompt rows are those
    whose logits nobody wanted. Pages are counted as they were swapped out, in, or not found intact.
    """

    steps: int = 0
    step_rows: int = 0
    prompt_rows: int = 0
    step_bytes: int = 0
    step_time: float = 0.0
    swapped_out: int = 0
    swapped_in: int = 0
    swap_lost: int = 0

    def __add__(self, other: StepStats) -> StepStats:
        return StepStats(
            self.steps + other.steps,
            self.step_rows + other.step_rows,
            self.prompt_rows + other.prompt_rows,
            self.step_bytes + other.step_bytes,
            self.step_time + other.step_time,
            self.swapped_out + other.swapped_out,
            self.swapped_in + other.swapped_in,
            self.swap_lost + other.swap_lost,
        )
