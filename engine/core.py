"""The step loop of one worker: schedule, run, publish. One thread owns it, model and pool included.

``EngineCore`` turns tasks into scheduler events, runs the planned rows through the model, lets the
token function choose, and returns what happened as outputs addressed to sequences by name. What one
sequence does wrong ends that sequence only: a step that raises is run again sequence by sequence,
which gives the others the same bits (law 1).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.errors import EngineFault, QuireError
from engine.generation import GenerateTask, Generation, PrefillTask
from engine.model import Model
from engine.outputs import (
    Admitted,
    ChunkDone,
    Failed,
    Output,
    PageFinished,
    Preempted,
    Prefilled,
    Reserved,
    StepStats,
)
from engine.scheduler import (
    Event,
    Fault,
    FinishedPage,
    Outcome,
    PlannedRows,
    Scheduler,
    SchedulerLimits,
    StepPlan,
    Submit,
)
from engine.sequence import Goal
from engine.telemetry.clock import now_ns
from kernels.ragged import RaggedBatch
from kvstore.fingerprint import LayoutFingerprint
from kvstore.memory import PageMemory
from kvstore.page import PageIdentity, PageReference, SealedPage
from kvstore.pool import PagePool
from kvstore.prefix_hash import PrefixHasher

log = logging.getLogger(__name__)

Task = GenerateTask | PrefillTask


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """``num_pages`` slots of ``page_size`` tokens; ``check_pages`` checks the pool every step."""

    num_pages: int
    page_size: int = 32
    limits: SchedulerLimits = field(default_factory=SchedulerLimits)
    check_pages: bool = False


class EngineCore:
    """Runs sequences of one model over one pool."""

    def __init__(
        self,
        model: Model,
        token_bytes: Callable[[int], bytes],
        settings: CoreSettings,
        boot_id: bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.boot_id = boot_id
        self.settings = settings
        self.layout = model.spec.page_layout(settings.page_size)
        self.fingerprint = fingerprint_of(model, settings.page_size)
        self.memory = PageMemory(self.layout, settings.num_pages)
        self.pool = PagePool(settings.num_pages, settings.page_size, clock)
        self.scheduler = Scheduler(self.pool, settings.limits, self._hasher)
        self._token_bytes = token_bytes
        self._generations: dict[str, Generation] = {}
        self._sealed: dict[int, SealedPage] = {}
        self._events: list[Event] = []
        self._outputs: list[Output] = []
        self.last_step = StepStats()
        self.totals = StepStats()

    def submit(self, tasks: Iterable[Task]) -> None:
        """Takes tasks in at the next step; several at once join as one batch."""
        for task in tasks:
            if isinstance(task, PrefillTask):
                submit = Submit(task.name, Goal.PREFILL, task.prompt_ids, task.tenant)
            else:
                self._generations[task.name] = Generation(task, self.model.spec, self._token_bytes)
                submit = Submit(
                    task.name, Goal.GENERATE, task.prompt_ids, task.tenant, task.remote, task.after
                )
            self._events.append(submit)

    def post(self, event: Event) -> None:
        """An event for the next step."""
        self._events.append(event)

    def forget(self, name: str) -> None:
        """No more output for a sequence; its cancellation is a matter of the scheduler."""
        self._generations.pop(name, None)

    def step(self, deliver: Callable[[list[Output]], None]) -> bool:
        """One turn of the loop; whether there is more to do at once.

        Outputs are delivered before the model runs and after: a reservation need not wait for it.
        """
        events, self._events = self._events, []
        plan = self.scheduler.plan(events)
        self._publish_plan(plan)
        self._deliver(deliver)
        if plan.rows:
            self._run(plan)
            self._deliver(deliver)
        if self.settings.check_pages:
            self.pool.check()
        return bool(plan.rows or plan.preempted)

    def _deliver(self, deliver: Callable[[list[Output]], None]) -> None:
        outputs, self._outputs = self._outputs, []
        if outputs:
            deliver(outputs)

    # -- run

    def _run(self, plan: StepPlan) -> None:
        started = now_ns()
        logits = self._forward(plan.rows)
        ended = now_ns()
        outcomes = {rows.name: self._choose(rows, logits[rows.name]) for rows in plan.rows}
        effects = self.scheduler.complete(plan, outcomes)
        self._publish_pages(effects.finished_pages)
        self._publish_chunks(plan.rows, started, ended)
        self._outputs += [Prefilled(name) for name in effects.prefilled]
        self._publish_faults(effects.faults)
        self.last_step = self._stats(plan.rows, ended - started)
        self.totals += self.last_step

    def _forward(self, rows: Sequence[PlannedRows]) -> dict[str, np.ndarray | EngineFault | None]:
        """Logits ``[vocab_size]`` of each sequence's last row if wanted, or why there are none."""
        try:
            logits = self.model.forward(ragged_batch(rows), self.memory.kv, self.layout).numpy()
        except Exception:
            if len(rows) == 1:
                log.exception("step failed for sequence=%s", rows[0].name)
                return {rows[0].name: EngineFault("the model failed on this request")}
            log.warning("step failed; running its %d sequences one by one", len(rows))
            return {row.name: self._forward([row])[row.name] for row in rows}
        wanted = iter(logits)
        return {row.name: next(wanted) if row.wants_logits else None for row in rows}

    def _choose(self, rows: PlannedRows, logits: np.ndarray | EngineFault | None) -> Outcome | None:
        """Lets the token function choose; None if the sequence failed."""
        if logits is None:
            return Outcome()
        try:
            if isinstance(logits, EngineFault):
                raise logits
            generation = self._generations[rows.name]
            output = generation.advance(logits)
        except QuireError as error:
            self._fail(rows.name, error)
            return None
        except Exception:
            log.exception("token function failed for sequence=%s", rows.name)
            self._fail(rows.name, EngineFault("choosing a token failed"))
            return None
        self._outputs.append(output)
        if output.finish is not None:
            self.forget(rows.name)
        return Outcome(output.token_id, output.finish is not None)

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
        self._publish_pages(plan.finished_pages)
        self._outputs += [Prefilled(name) for name in plan.prefilled]
        self._outputs += [Preempted(name) for name in plan.preempted]
        self._publish_faults(plan.faults)

    def _publish_faults(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            log.error("page violation sequence=%s problem=%s", fault.name, fault.problem)
            self._fail(fault.name, EngineFault("a page of this request was in a wrong state"))
        for violation in self.pool.take_violations():
            log.error("page violation problem=%s", violation)

    def _publish_pages(self, pages: Iterable[FinishedPage]) -> None:
        self._outputs += [PageFinished(page.name, self._sealed_page(page)) for page in pages]

    def _publish_chunks(self, rows: Sequence[PlannedRows], started: int, ended: int) -> None:
        for row in rows:
            if len(row.tokens) > 1 or not row.wants_logits:
                chunk = ChunkDone(row.name, row.start, len(row.tokens), started, ended)
                self._outputs.append(chunk)

    def _sealed_page(self, page: FinishedPage) -> SealedPage:
        """Identity and digests of a sealed page, computed once per generation of its slot."""
        reference = PageReference(
            boot_id=self.boot_id,
            slot=page.slot,
            generation=self.pool.ledger[page.slot].generation,
            prefix_hash=page.prefix_hash,
            fingerprint=self.fingerprint.digest,
        )
        identity = PageIdentity(reference, page.page_index, page.num_tokens)
        known = self._sealed.get(page.slot)
        if known is None or known.identity != identity:
            self.memory.clear_tail(page.slot, page.num_tokens)
            known = SealedPage(identity, self.memory.digests(page.slot, identity))
            self._sealed[page.slot] = known
        return known

    def _stats(self, rows: Sequence[PlannedRows], elapsed_ns: int) -> StepStats:
        context = sum(row.start + len(row.tokens) for row in rows)
        num_rows = sum(len(row.tokens) for row in rows)
        return StepStats(
            steps=1,
            step_rows=num_rows,
            prompt_rows=num_rows - sum(row.wants_logits for row in rows),
            step_bytes=self.model.spec.weight_bytes + context * self.layout.token_bytes,
            step_time=elapsed_ns / 1e9,
        )

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


def ragged_batch(rows: Sequence[PlannedRows]) -> RaggedBatch:
    """The planned rows as tensors, in the order of the plan."""
    starts = np.cumsum([0] + [len(row.tokens) for row in rows])
    table = np.full((len(rows), max(len(row.pages) for row in rows)), -1, dtype=np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row.pages)] = row.pages
    positions = [np.arange(row.start, row.start + len(row.tokens)) for row in rows]
    logit_rows = [end - 1 for row, end in zip(rows, starts[1:], strict=True) if row.wants_logits]
    return RaggedBatch(
        token_ids=torch.tensor([token for row in rows for token in row.tokens], dtype=torch.int64),
        positions=torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        query_starts=torch.from_numpy(starts.astype(np.int64)),
        page_tables=torch.from_numpy(table),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
    )
