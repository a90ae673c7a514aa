"""What a scheduler is told and what it says: events come in, a plan of the next step goes out.

Values without behaviour. Imports neither torch, grpc nor redis.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.lending import Grant, Lend
from engine.sequence import Goal
from engine.swapping import Rates, SwapIn, SwapOut


@dataclass(frozen=True, slots=True)
class Submit:
    """A new sequence. ``after`` names a sequence of the same prompt to wait for (n > 1);
    ``output`` are the tokens it has after its prompt (a resumed stream)."""

    name: str
    goal: Goal
    prompt: tuple[int, ...]
    tenant: str = ""
    remote: bool = False
    after: str | None = None
    output: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Cancel:
    """The sequence, or the lease it left behind, is not wanted any more. Unknown names are fine."""

    name: str


@dataclass(frozen=True, slots=True)
class Landed:
    """The handover or swap into reserved pages is over: nobody writes into them any more, and the
    first ``num_tokens`` tokens are verified. Only the first one told of a sequence counts.

    Under ``foreign`` stand pages whose numbers are not this worker's own; empty for all others.
    """

    name: str
    num_tokens: int
    foreign: bytes = b""


@dataclass(frozen=True, slots=True)
class ReadsEnded:
    """Pages announced for the sequence were read."""

    name: str
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """What computing and swapping take on this worker by now."""

    rates: Rates


@dataclass(frozen=True, slots=True)
class Drafted:
    """What may come next in a sequence. Counts for this step only, as far as there is room."""

    name: str
    tokens: tuple[int, ...]


Event = Submit | Cancel | Landed | ReadsEnded | Lend | Measured | Drafted


@dataclass(frozen=True, slots=True)
class PlannedRows:
    """``tokens`` of a sequence from position ``start`` on, with the page table they need.

    The last ``num_drafts`` of them are guesses, to be verified.
    """

    name: str
    start: int
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    wants_logits: bool
    num_drafts: int = 0

    @property
    def num_logits(self) -> int:
        """Rows whose logits are wanted: the last ones."""
        return self.num_drafts + 1 if self.wants_logits else 0

    @property
    def drafts(self) -> tuple[int, ...]:
        return self.tokens[len(self.tokens) - self.num_drafts :]


@dataclass(frozen=True, slots=True)
class Reservation:
    """Pages for a handover: ``slots`` follow ``num_cached_pages`` pages that are here already."""

    name: str
    slots: tuple[int, ...]
    num_cached_pages: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class FinishedPage:
    """A page of a prefill sequence, finished already or by the step planned, to be announced; one
    read of it has begun."""

    name: str
    slot: int
    page_index: int
    num_tokens: int
    prefix_hash: bytes


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence got its pages; ``cached_tokens`` of it were here already."""

    name: str
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Fault:
    """A page of the sequence was not in the state it must be in; the sequence is gone."""

    name: str
    problem: str


@dataclass(frozen=True, slots=True)
class StepPlan:
    """``finished_pages`` came from the prefix cache; the step's rows finish ``coming_pages``."""

    rows: tuple[PlannedRows, ...] = ()
    admissions: tuple[Admission, ...] = ()
    reservations: tuple[Reservation, ...] = ()
    finished_pages: tuple[FinishedPage, ...] = ()
    coming_pages: tuple[FinishedPage, ...] = ()
    prefilled: tuple[str, ...] = ()
    preempted: tuple[str, ...] = ()
    swap_outs: tuple[SwapOut, ...] = ()
    swap_ins: tuple[SwapIn, ...] = ()
    grants: tuple[Grant, ...] = ()
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step brought one sequence: tokens, all but the last of them drafted ones, and whether
    it ended with them."""

    token_ids: tuple[int, ...] = ()
    finished: bool = False


@dataclass(frozen=True, slots=True)
class StepEffects:
    prefilled: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
