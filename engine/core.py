"""The step loop of one worker: schedule, run, publish. One thread owns it, model and pool included.

``EngineCore`` turns tasks into scheduler events, runs the planned rows through the model, lets the
token function choose, and returns what happened as outputs addressed to sequences by name. What one
sequence does wrong ends that sequence only: a step that raises is run again sequence by sequence,
which gives the others the same bits (law 1).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineFault, QuireError
from engine.generation import GenerateTask, Generation, PrefillTask
from engine.lending import LentPage
from engine.model import Model
from engine.outputs import (
    Admitted,
    ChunkDone,
    Failed,
    Lent,
    Output,
    PagesComing,
    Preempted,
    Prefilled,
    Reserved,
    StepStats,
    TokenOutput,
)
from engine.plan import (
    Cancel,
    Event,
    Fault,
    FinishedPage,
    Outcome,
    PlannedRows,
    StepPlan,
    Submit,
)
from engine.ragged_rows import ragged_batch
from engine.recording import RecordedScheduler
from engine.scheduler import Scheduler, SchedulerLimits
from engine.sequence import Goal
from engine.speculation import (
    Drafter,
    DraftHead,
    DraftModel,
    HeadWeights,
    SequencePages,
    Speculator,
    SpeculatorPair,
    StepTimes,
    measure_attention,
    measure_steps,
    open_speculator,
)
from engine.swapper import Swapper
from engine.telemetry.clock import now_ns
from engine.token_function import TokenChoice, choose, chosen
from kernels.progress import LayerProgress
from kvstore.fingerprint import LayoutFingerprint
from kvstore.memory import PageMemory
from kvstore.page import PageIdentity, PageReference
from kvstore.pool import PagePool
from kvstore.prefix_hash import PrefixHasher
from kvstore.swap import open_swap

log = logging.getLogger(__name__)

Task = GenerateTask | PrefillTask
Found = np.ndarray | list[int] | EngineFault | None
Choice = TokenChoice | QuireError


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """``num_pages`` slots of ``page_size`` tokens; ``check_pages`` checks the pool every step;
    ``record`` is a file for the scheduler's events and plans. ``swap_bytes`` is the
    room for pages of preempted sequences, in host memory or in a file in ``swap_dir``.
    ``speculate`` is one of ``engine.modes.SPECULATION_MODES``."""

    num_pages: int
    page_size: int = 32
    limits: SchedulerLimits = field(default_factory=SchedulerLimits)
    check_pages: bool = False
    record: Path | None = None
    swap_bytes: int = 0
    swap_dir: Path | None = None
    speculate: str = "off"


class EngineCore:
    """Runs sequences of one model over one pool, whose bytes are in ``memory`` if given.

    ``draft`` proposes tokens where the settings ask for a model's or a head's; a model has the
    target's vocabulary. Raises ModelError for a head of another model's shapes.
    """

    def __init__(
        self,
        model: Model,
        token_bytes: Callable[[int], bytes],
        settings: CoreSettings,
        boot_id: bytes,
        clock: Callable[[], float] = time.monotonic,
        memory: PageMemory | None = None,
        draft: Drafter | None = None,
    ) -> None:
        self.model = model
        self.boot_id = boot_id
        self.settings = settings
        self.layout = model.spec.page_layout(settings.page_size)
        self._kv_token_bytes = self.layout.token_bytes  # of five properties, asked for every step
        self.fingerprint = fingerprint_of(model, settings.page_size)
        self.memory = memory or PageMemory(self.layout, settings.num_pages)
        self.pool = PagePool(settings.num_pages, settings.page_size, clock, self.memory.generations)
        self.progress = LayerProgress(self.memory.groups.layers_per_group)
        self._swapper = self._open_swapper()
        self.scheduler = self._scheduler()
        self.token_bytes = token_bytes
        self._generations: dict[str, Generation] = {}
        self._events: list[Event] = []
        self._outputs: list[Output] = []
        self.speculator: Speculator | SpeculatorPair | None = self._open_speculator(draft)
        self._decoding: list[str] = []
        self._hidden: dict[str, NDArray[np.float32]] = {}
        self.last_step = StepStats()
        self.totals = StepStats()

    def submit(self, tasks: Iterable[Task]) -> None:
        """Takes tasks in at the next step; several at once join as one batch."""
        for task in tasks:
            if isinstance(task, PrefillTask):
                submit = Submit(task.name, Goal.PREFILL, task.prompt_ids, task.tenant)
            else:
                self._generations[task.name] = Generation(task, self.model.spec, self.token_bytes)
                if self.speculator is not None:
                    tokens = (*task.prompt_ids, *task.output_ids)
                    self.speculator.begin(task.name, tokens, task.tenant)
                submit = Submit(
                    name=task.name,
                    goal=Goal.GENERATE,
                    prompt=task.prompt_ids,
                    tenant=task.tenant,
                    remote=task.remote,
                    after=task.after,
                    output=task.output_ids,
                )
            self._events.append(submit)

    def post(self, event: Event) -> None:
        """An event for the next step."""
        self._events.append(event)

    @property
    def leaving(self) -> set[str]:
        """Names whose end has been told and not been taken in yet."""
        return {event.name for event in self._events if isinstance(event, Cancel)}

    def forget(self, name: str) -> None:
        """No more output for a sequence; its cancellation is a matter of the scheduler."""
        self._generations.pop(name, None)
        if self.speculator is not None:
            self.speculator.forget(name)

    def step(self, deliver: Callable[[list[Output]], None]) -> bool:
        """One turn of the loop; whether there is more to do at once.

        Outputs are delivered before the model runs and after: a reservation need not wait for it.
        """
        events, self._events = self._events + self._drafts(), []
        plan = self.scheduler.plan(events)
        self._swap(plan)
        self._publish_plan(plan)
        self._deliver(deliver)
        if plan.rows:
            self._run(plan)
            self._deliver(deliver)
        if self.settings.check_pages:
            self.scheduler.check()
        return bool(plan.rows or plan.preempted or plan.swap_ins)

    def close(self) -> None:
        """Gives the swap room back; no step may follow."""
        if self._swapper is not None:
            self._swapper.close()

    def _drafts(self) -> list[Event]:
        """Of the sequences that the last step brought tokens."""
        decoding, self._decoding = self._decoding, []
        if self.speculator is None or not decoding:
            return []
        left = {
            name: generation.num_left
            for name in decoding
            if (generation := self._generations.get(name)) is not None
        }
        return [*self.speculator.drafts(left, self.last_step.prompt_rows)]

    def _deliver(self, deliver: Callable[[list[Output]], None]) -> None:
        outputs, self._outputs = self._outputs, []
        if outputs:
            deliver(outputs)

    def _swap(self, plan: StepPlan) -> None:
        if self._swapper is not None:
            self.totals += self._swapper.exchange(plan)
            self._events += self._swapper.take_events()

    # -- run

    def _run(self, plan: StepPlan) -> None:
        started = now_ns()
        base = self.progress.num_done
        self._hidden.clear()
        found = self._forward(plan.rows, self.progress if plan.coming_pages else None)
        ended = now_ns()
        outcomes = self._choose(plan.rows, found)
        self._decoding = [name for name, each in outcomes.items() if each and each.token_ids]
        effects = self.scheduler.complete(plan, outcomes)
        self._publish_chunks(plan.rows, started, ended)
        self._outputs += [Prefilled(name) for name in effects.prefilled]
        self._publish_faults(effects.faults)
        if plan.coming_pages:  # a step that failed on the way has told less
            self.progress.tell(base + self.layout.num_layers)
        self.last_step = self._stats(plan.rows, ended - started)
        if self.speculator is not None and not self.last_step.prompt_rows:
            times = self.speculator.times
            attention_s = sum(times.attention_s(len(row.tokens), row.start) for row in plan.rows)
            times.learn(self.last_step.step_rows, self.last_step.step_time, attention_s)
        if self._swapper is not None:
            self._swapper.learn(self.last_step)
        self.totals += self.last_step

    def _forward(
        self, rows: Sequence[PlannedRows], progress: LayerProgress | None = None
    ) -> dict[str, Found]:
        """Of each sequence's last rows, if wanted, their logits ``[rows, vocab_size]`` or, if that
        is enough for all of them, the ids of the largest; or why there are none."""
        best_only = not any(
            row.wants_logits and self._generations[row.name].needs_logits for row in rows
        )
        width = 0 if self.speculator is None else self.speculator.hidden_width
        batch = ragged_batch(rows, best_only, progress, width)
        try:
            result = self.model.forward(batch, self.memory.kv, self.layout)
        except Exception:
            if len(rows) == 1:
                log.exception("step failed for sequence=%s", rows[0].name)
                return {rows[0].name: EngineFault("the model failed on this request")}
            log.warning("step failed; running its %d sequences one by one", len(rows))
            return {row.name: self._forward([row])[row.name] for row in rows}
        each = result if isinstance(result, list) else result.numpy()
        found: dict[str, Found] = {}
        first = 0
        for row in rows:
            last = first + row.num_logits
            found[row.name] = each[first:last] if row.wants_logits else None
            if batch.hidden is not None and row.wants_logits:
                self._hidden[row.name] = batch.hidden[first:last]
            first = last
        return found

    def _choose(
        self, rows: Sequence[PlannedRows], found: Mapping[str, Found]
    ) -> dict[str, Outcome | None]:
        """What the token function makes of each sequence; None for those that failed."""
        logits = {
            row.name: (result, row.drafts)
            for row in rows
            if isinstance(result := found[row.name], np.ndarray)
        }
        choices = self._choices(logits)
        outcomes: dict[str, Outcome | None] = {}
        for row in rows:
            result = found[row.name]
            if result is None:
                outcomes[row.name] = Outcome()
            elif isinstance(result, list):
                outcomes[row.name] = self._take(row, map(chosen, result))
            elif isinstance(result, np.ndarray):
                outcomes[row.name] = self._take(row, choices[row.name])
            else:
                outcomes[row.name] = self._take(row, [result])
        return outcomes

    def _choices(
        self, logits: Mapping[str, tuple[np.ndarray, tuple[int, ...]]]
    ) -> Mapping[str, Sequence[Choice]]:
        """Lets the token function choose for all sequences, and after all drafts, at once."""
        if not logits:
            return {}
        try:
            rows = {name: self._generations[name].prepare(*each) for name, each in logits.items()}
            choices = iter(choose([row for each in rows.values() for row in each]))
            return {name: [next(choices) for _ in each] for name, each in rows.items()}
        except Exception:
            if len(logits) == 1:
                log.exception("token function failed for sequence=%s", *logits)
                return {name: [EngineFault("choosing a token failed")] for name in logits}
            log.warning("choosing failed; asking for the %d sequences one by one", len(logits))
            return {name: self._choices({name: row})[name] for name, row in logits.items()}

    def _take(self, row: PlannedRows, choices: Iterable[Choice]) -> Outcome | None:
        """Takes the first choice, and each next one while the drafts before it were right."""
        token_ids: list[int] = []
        finished = False
        for choice, draft in zip_longest(choices, row.drafts):
            num_drafts = 0 if token_ids else row.num_drafts
            output = self._accept(row.name, choice, num_drafts, bool(token_ids))
            if output is None:
                return None
            token_ids.append(output.token_id)
            finished = output.finish is not None
            if finished or output.token_id != draft:
                break
        if self.speculator is not None:
            hidden = self._hidden.get(row.name)
            last = None if hidden is None else hidden[len(token_ids) - 1]
            self.speculator.verified(row.name, row.drafts, token_ids, last)
        return Outcome(tuple(token_ids), finished)

    def _accept(
        self, name: str, choice: Choice, num_drafts: int, drafted: bool
    ) -> TokenOutput | None:
        """Takes a token into its sequence; None if the sequence failed."""
        try:
            if isinstance(choice, QuireError):
                raise choice
            output = self._generations[name].accept(choice, num_drafts, drafted)
        except QuireError as error:
            self._fail(name, error)
            return None
        except Exception:
            log.exception("taking a token failed for sequence=%s", name)
            self._fail(name, EngineFault("choosing a token failed"))
            return None
        self._outputs.append(output)
        if output.finish is not None:
            self.forget(name)
        return output

    def _fail(self, name: str, error: QuireError) -> None:
        self._outputs.append(Failed(name, error))
        self.forget(name)

    # -- publish

    def _publish_plan(self, plan: StepPlan) -> None:
        for admission in plan.admissions:
            self._outputs.append(Admitted(admission.name, admission.cached_tokens))
        for reservation in plan.reservations:
            generations = tuple(self.pool.ledger[slot].generation for slot in reservation.slots)
            self._outputs.append(Reserved(reservation, generations))
        if plan.finished_pages:
            self._publish_pages(plan.finished_pages, base=-self.layout.num_layers)
        if plan.coming_pages:
            self._clear_tails(plan.coming_pages)
            self._publish_pages(plan.coming_pages, base=self.progress.num_done)
        self._outputs += [Prefilled(name) for name in plan.prefilled]
        self._outputs += [Preempted(name) for name in plan.preempted]
        for grant in plan.grants:
            pages = tuple(map(self._identity, grant.pages))
            self._outputs.append(Lent(grant.name, pages, grant.refusal))
        self._publish_faults(plan.faults)

    def _publish_faults(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            log.error("page violation sequence=%s problem=%s", fault.name, fault.problem)
            self._fail(fault.name, EngineFault("a page of this request was in a wrong state"))
        for violation in self.pool.take_violations():
            log.error("page violation problem=%s", violation)

    def _publish_pages(self, pages: Iterable[FinishedPage], base: int) -> None:
        for name, group in groupby(pages, key=lambda page: page.name):
            self._outputs.append(PagesComing(name, tuple(map(self._identity, group)), base))

    def _clear_tails(self, pages: Iterable[FinishedPage]) -> None:
        """Before their first layers leave: whatever a slot held before must not leave with them."""
        for page in pages:
            if page.num_tokens < self.settings.page_size:
                self.memory.clear_tail(page.slot, page.num_tokens)

    def _publish_chunks(self, rows: Sequence[PlannedRows], started: int, ended: int) -> None:
        for row in rows:
            if len(row.tokens) > row.num_logits:
                num_tokens = len(row.tokens) - row.num_drafts
                chunk = ChunkDone(row.name, row.start, num_tokens, started, ended)
                self._outputs.append(chunk)

    def _identity(self, page: FinishedPage | LentPage) -> PageIdentity:
        reference = PageReference(
            boot_id=self.boot_id,
            slot=page.slot,
            generation=self.pool.ledger[page.slot].generation,
            prefix_hash=page.prefix_hash,
            fingerprint=self.fingerprint.digest,
        )
        return PageIdentity(reference, page.page_index, page.num_tokens)

    def _stats(self, rows: Sequence[PlannedRows], elapsed_ns: int) -> StepStats:
        context = num_rows = num_logits = 0
        for row in rows:
            num_rows += len(row.tokens)
            num_logits += row.num_logits
            context += row.start + len(row.tokens)
        return StepStats(
            steps=1,
            step_rows=num_rows,
            prompt_rows=num_rows - num_logits,
            step_bytes=self.model.spec.weight_bytes + context * self._kv_token_bytes,
            step_time=elapsed_ns / 1e9,
        )

    def _scheduler(self) -> Scheduler:
        pool, settings = self.pool, self.settings
        num_swap_slots = settings.swap_bytes // self.layout.page_bytes
        if settings.record is None:
            return Scheduler(pool, settings.limits, self._hasher, num_swap_slots)
        return RecordedScheduler(
            pool,
            settings.limits,
            self.fingerprint.digest,
            settings.record,
            num_swap_slots,
        )

    def _open_speculator(self, draft: Drafter | None) -> Speculator | SpeculatorPair | None:
        if self.settings.speculate == "off":
            return None
        settings = self.settings
        measured = self.model, self.memory.kv, self.layout
        times = StepTimes(measure_steps(*measured), measure_attention(*measured))
        proposer: DraftModel | DraftHead | None = None
        if isinstance(draft, HeadWeights):
            pages = SequencePages(self.memory.kv, self.layout, self._pages_of)
            proposer = DraftHead(draft, self.model, pages, self._generations)
        elif draft is not None:
            proposer = DraftModel(draft, settings.num_pages, settings.page_size, self._generations)
        return open_speculator(settings.speculate, self.model.spec.vocab_size, times, proposer)

    def _pages_of(self, name: str) -> Sequence[int]:
        sequence = self.scheduler.sequence(name)
        return () if sequence is None else sequence.pages

    def _open_swapper(self) -> Swapper | None:
        settings = self.settings
        space = open_swap(settings.swap_bytes, settings.swap_dir, self.layout.page_bytes)
        return None if space is None else Swapper(space, self.memory, settings.page_size)

    def _hasher(self, tenant: str) -> PrefixHasher:
        return PrefixHasher(tenant, self.fingerprint.digest, self.settings.page_size)


def fingerprint_of(model: Model, page_size: int) -> LayoutFingerprint:
    """The layout fingerprint of a model's pages of ``page_size`` tokens."""
    spec = model.spec
    return LayoutFingerprint(
        model_digest=spec.digest,
        numerics=spec.numerics,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        page_size=page_size,
        kv_dtype=spec.kv_dtype,
        layout_id=spec.page_layout(page_size).layout_id,
    )
