"""One request in an engine, from its tasks to the stream of its items, traced on the way.

Both users of an engine, ``LocalEngine`` and the decode service, run their requests through this.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

from opentelemetry.context import Context

from engine.admission import Capacity, check_prompt, output_limit
from engine.completion import (
    Delta,
    Finished,
    Started,
    StreamItem,
    Timings,
    TokenLogprobs,
    Usage,
    Waiting,
)
from engine.core import EngineCore
from engine.generation import GenerateTask
from engine.lifecycle import Lifecycle
from engine.mailbox import AsyncEngine
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
    TokenOutput,
)
from engine.resume import ChoiceSoFar, check_resume, check_seed
from engine.sampling_params import SamplingParams
from engine.telemetry.attributes import (
    GEN_AI_RESPONSE_FINISH_REASONS,
    GEN_AI_RESPONSE_ID,
    GEN_AI_USAGE_CACHED_TOKENS,
    GEN_AI_USAGE_OUTPUT_TOKENS,
)
from engine.telemetry.clock import now_ns
from engine.telemetry.tracing import Attributes, record_stage

REQUEST_ID_BYTES = 16
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Brought:
    """What came into reserved pages: how many tokens, and the digest they stand under if their
    numbers are not this worker's own."""

    num_tokens: int
    foreign: bytes = b""


Intake = Callable[[Reserved], Awaitable[Brought]]
"""Fills reserved pages from elsewhere, posts that they landed, tells what came."""


@dataclass(slots=True)
class _Times:
    """A request's milestones on ``engine.telemetry.clock``, in nanoseconds."""

    admitted: int
    got_pages: int = 0
    joined: int = 0
    first_token: int = 0
    ended: int = 0


@dataclass(slots=True)
class Request:
    """A validated request. ``params.seed`` is set; ``parent`` is the trace it belongs to.

    ``resume`` is what an interrupted stream of it has brought already: this one goes on from there.
    It tells that it waits whenever it has nothing to say for ``waiting_every_s``.
    ``on_chunk`` hears of every chunk of the prompt that is computed here.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    capacity: Capacity
    tenant: str = ""
    resume: tuple[ChoiceSoFar, ...] = ()
    intake: Intake | None = None
    waiting_every_s: float | None = None
    on_chunk: Callable[[ChunkDone], None] | None = None
    output_queue: int = 100_000
    parent: Context | None = None
    request_id: bytes = field(default_factory=lambda: secrets.token_bytes(REQUEST_ID_BYTES))

    def __post_init__(self) -> None:
        check_prompt(self.prompt_ids, self.capacity)
        check_seed(self.resume, self.params)
        self.params = self.params.with_seed()
        self.params.check_against(self.capacity.vocab_size)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{self.request_id.hex()}/{index}" for index in range(self.params.n))

    @property
    def max_tokens(self) -> int:
        """The limit of each choice's output in effect."""
        return output_limit(self.params, len(self.prompt_ids), self.capacity)

    @property
    def so_far(self) -> dict[int, ChoiceSoFar]:
        """What each choice has already, by its index."""
        given = {choice.choice_index: choice for choice in self.resume}
        return {index: given.get(index, ChoiceSoFar(index)) for index in range(self.params.n)}

    @property
    def first_ids(self) -> tuple[int, ...]:
        """The tokens whose pages are wanted first: those of the first choice that goes on."""
        going_on = (each.token_ids for each in self.so_far.values() if not each.finished)
        return (*self.prompt_ids, *next(going_on, ()))

    async def stream(self, engine: AsyncEngine) -> AsyncGenerator[StreamItem | Waiting, None]:
        """Runs the request; whatever ends the iteration, its pages are given back.

        Raises InvalidRequest for a ``resume`` that cannot be.
        """
        if self.resume:
            await asyncio.to_thread(self._check_resume, engine.core)
        run = _Run(self, engine)
        try:
            yield run.started
            async for item in run.items():
                yield item
        finally:
            await run.close()

    def tasks(self) -> list[GenerateTask]:
        """One task per choice that has not ended; all but the first of them wait to share the first
        one's prompt pages."""
        assert self.params.seed is not None
        going_on = [each for each in self.so_far.values() if not each.finished]
        return [
            GenerateTask(
                name=self.names[choice.choice_index],
                prompt_ids=self.prompt_ids,
                params=self.params,
                seed=self.params.seed,
                max_tokens=self.max_tokens,
                choice_index=choice.choice_index,
                tenant=self.tenant,
                remote=self.intake is not None and choice is going_on[0],
                after=None if choice is going_on[0] else self.names[going_on[0].choice_index],
                output_ids=choice.token_ids,
            )
            for choice in going_on
        ]

    def _check_resume(self, core: EngineCore) -> None:
        spec = core.model.spec
        check_resume(
            self.resume,
            self.params,
            self.max_tokens,
            spec.vocab_size,
            spec.eos_token_ids,
            core.token_bytes,
        )


class _Run:
    """A request while it runs."""

    def __init__(self, request: Request, engine: AsyncEngine) -> None:
        self._request = request
        self._engine = engine
        self._times = _Times(admitted=now_ns())
        self._indexes = {name: index for index, name in enumerate(request.names)}
        tasks, so_far = request.tasks(), request.so_far
        self._counts = {name: len(so_far[index].token_ids) for name, index in self._indexes.items()}
        self._num_resumed = sum(self._counts.values())
        self._unfinished = {task.name for task in tasks}
        self._first = tasks[0].name if tasks else ""
        self._finish_reasons = dict.fromkeys(self._indexes.keys() - self._unfinished, "before")
        self._cached_tokens = 0
        self._handed_over = 0
        self._foreign = b""
        self._num_preemptions = 0
        self._drafted_tokens = 0
        self._accepted_tokens = 0
        self._intake: asyncio.Task[None] | None = None
        self._mailbox = engine.open([task.name for task in tasks], request.output_queue)
        engine.submit(tasks)

    @property
    def started(self) -> Started:
        request = self._request
        assert request.params.seed is not None
        core = self._engine.core
        return Started(
            request_id=request.request_id,
            seed=request.params.seed,
            prompt_ids=request.prompt_ids,
            boot_id=core.boot_id,
            max_tokens=request.max_tokens,
            numerics_digest=core.fingerprint.numerics_digest,
        )

    async def items(self) -> AsyncGenerator[StreamItem | Waiting, None]:
        silent_since = now_ns()
        while self._unfinished:
            try:
                async with asyncio.timeout(self._request.waiting_every_s):
                    outputs = await self._mailbox.get()
            except TimeoutError:
                yield Waiting((now_ns() - silent_since) / 1e9)
                continue
            silent_since = now_ns()
            for output in outputs:
                delta = self._take(output)
                if delta is not None:
                    yield delta
        yield self._finished()

    async def close(self) -> None:
        """Gives everything back, first of all and without waiting: the task that closes a request
        may be cancelled once more. Pages that the intake still writes stay withheld until it ends.
        """
        self._times.ended = now_ns()
        self._engine.close(self._mailbox)
        try:
            if self._intake is not None:
                self._intake.cancel()
                await asyncio.gather(self._intake, return_exceptions=True)
        finally:
            self._record_finish()

    def _record_finish(self) -> None:
        """Tells the trace how every choice ended; ``unfinished`` ones were cancelled or failed."""
        reasons = [self._finish_reasons.get(name, "unfinished") for name in self._indexes]
        attributes = {
            GEN_AI_RESPONSE_ID: self._request.request_id.hex(),
            GEN_AI_RESPONSE_FINISH_REASONS: reasons,
        }
        self._record(Lifecycle.FINISH, self._times.ended, now_ns(), attributes)

    def _take(self, output: Output) -> Delta | None:
        match output:
            case Admitted(name, cached_tokens):
                self._admitted(name, cached_tokens)
            case Reserved(reservation):
                self._engine.begin_filling(reservation.name)
                self._intake = asyncio.create_task(self._run_intake(output))
                self._intake.add_done_callback(partial(self._intake_ended, reservation.name))
            case ChunkDone():
                self._chunk_done(output)
            case Preempted():
                self._num_preemptions += 1
            case TokenOutput():
                return self._token(output)
            case Failed() | PagesComing() | Prefilled() | Lent():
                pass
        return None

    def _admitted(self, name: str, cached_tokens: int) -> None:
        if name != self._first or self._times.got_pages:
            return
        self._times.got_pages = now_ns()
        self._cached_tokens = cached_tokens
        self._record(
            Lifecycle.QUEUE,
            self._times.admitted,
            self._times.got_pages,
            {GEN_AI_USAGE_CACHED_TOKENS: cached_tokens},
        )

    def _chunk_done(self, chunk: ChunkDone) -> None:
        if self._request.on_chunk is not None:
            self._request.on_chunk(chunk)
        if not self._times.first_token:
            self._times.joined = chunk.ended_ns
        attributes = {"quire.tokens": chunk.num_tokens, "quire.start": chunk.start}
        self._record(Lifecycle.PREFILL_CHUNK, chunk.started_ns, chunk.ended_ns, attributes)

    async def _run_intake(self, reserved: Reserved) -> None:
        assert self._request.intake is not None
        brought = await self._request.intake(reserved)
        self._handed_over, self._foreign = brought.num_tokens, brought.foreign
        self._times.joined = now_ns()

    def _intake_ended(self, name: str, intake: asyncio.Task[None]) -> None:
        """However it ended, even before it began, nobody writes into the reserved pages now: what
        did not land is computed here. It changes nothing if the intake has told of a landing."""
        if not intake.cancelled() and intake.exception() is not None:
            log.error("intake failed; the prompt is computed here", exc_info=intake.exception())
        self._engine.end_filling(name)

    def _token(self, output: TokenOutput) -> Delta:
        now = now_ns()
        if not self._times.first_token:
            self._times.first_token = now
            self._record(Lifecycle.JOIN, self._times.joined or now, now, {})
        self._drafted_tokens += output.num_drafts
        self._accepted_tokens += output.drafted
        first_index = self._counts[output.name]
        self._counts[output.name] += 1
        if output.finish is not None:
            self._unfinished.discard(output.name)
            self._finish_reasons[output.name] = str(output.finish)
        return Delta(
            choice_index=self._indexes[output.name],
            first_index=first_index,
            token_ids=(output.token_id,),
            text=output.text,
            logprobs=self._logprobs(output),
            finish_reason=output.finish,
            matched_stop=output.matched_stop,
            foreign_kv=self._foreign,
        )

    def _logprobs(self, output: TokenOutput) -> tuple[TokenLogprobs, ...]:
        if output.logprob is None:
            return ()
        return (TokenLogprobs(output.token_id, output.logprob, output.top_logprobs),)

    def _finished(self) -> Finished:
        times, now = self._times, now_ns()
        num_output = sum(self._counts.values())
        self._record(
            Lifecycle.DECODE,
            times.first_token or now,
            now,
            {
                GEN_AI_USAGE_OUTPUT_TOKENS: num_output,
                "quire.preemptions": self._num_preemptions,
                "quire.drafted_tokens": self._drafted_tokens,
                "quire.accepted_tokens": self._accepted_tokens,
            },
        )
        # A stream resumed after its last token has no milestones: nothing took any time.
        got_pages, first_token = (
            at or times.admitted for at in (times.got_pages, times.first_token)
        )
        joined = times.joined or first_token
        timings = Timings(
            queue_s=(got_pages - times.admitted) / 1e9,
            prefill_s=(joined - got_pages) / 1e9,
            first_token_s=(first_token - times.admitted) / 1e9,
            total_s=(now - times.admitted) / 1e9,
        )
        usage = Usage(
            prompt_tokens=len(self._request.prompt_ids),
            output_tokens=num_output,
            cached_tokens=self._cached_tokens,
            handed_over_tokens=self._handed_over,
            preemptions=self._num_preemptions,
            resumed_tokens=self._num_resumed,
            drafted_tokens=self._drafted_tokens,
            accepted_tokens=self._accepted_tokens,
        )
        return Finished(usage, timings, self._prefilled())

    def _prefilled(self) -> str:
        if self._handed_over:
            return "remote"
        page_size = self._engine.core.settings.page_size
        rest = len(self._request.first_ids) - 1 - self._cached_tokens
        return "cached" if self._cached_tokens and rest < page_size else "local"

    def _record(
        self, stage: Lifecycle, started_ns: int, ended_ns: int, attributes: Attributes
    ) -> None:
        record_stage(stage, started_ns, ended_ns, self._request.parent, attributes)
