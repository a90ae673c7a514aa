"""Export of pages: from the pages of a sequence, while they are computed, to a handover's messages.

A page leaves in groups of layers. The step that finishes a page counts its layers as it goes
(``kernels.progress``); each count lets this side digest what is final of the pages and announce it,
while the step computes on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import dataclass

from engine.lifecycle import Lifecycle
from engine.mailbox import AsyncEngine, Mailbox
from engine.outputs import Admitted, ChunkDone, Output, PagesComing, Prefilled
from engine.plan import ReadsEnded
from engine.telemetry.clock import now_ns
from engine.telemetry.group_spans import GroupSpans
from engine.telemetry.tracing import current_context, record_stage
from kvstore.memory import LayerGroups
from kvstore.page import Commit, PageFrame, PageIdentity, digest_of
from kvstore.prefix_hash import ROOT

PROGRESS_EVERY_S = 0.5
MAX_MESSAGE_BYTES = 2 << 20
Message = Admitted | list[PageFrame] | Commit | int


@dataclass(slots=True)
class _Coming:
    """Pages announced to us; ``num_left`` groups of them have gone on their way."""

    pages: tuple[PageIdentity, ...]
    base: int
    num_left: int = 0


class Export:
    """Turns the outputs of one prefill sequence into what is sent.

    Yields ``Admitted`` once, then lists of frames as layer groups are finished, an ``int`` (prompt
    tokens done so far) whenever there was nothing else to say for half a second, ``Commit`` last.
    Pages before ``first_page`` are with the receiver already and are skipped. Frames contain the
    bytes if ``with_payload``; if not, the receiver reads them, under the hold that the sequence
    and then its lease have on the pages.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        mailbox: Mailbox,
        num_tokens: int,
        first_page: int,
        *,
        with_payload: bool = True,
    ) -> None:
        self._engine = engine
        self._mailbox = mailbox
        (self._name,) = mailbox.names
        self._num_tokens = num_tokens
        self._first_page = first_page
        self._with_payload = with_payload
        self._memory = engine.core.memory
        self._coming: deque[_Coming] = deque()
        self._next_page = 0
        self._num_done = 0
        self._last_name = ROOT
        self._seal_digests: list[bytes] = []
        self._prefilled = False
        self._began_ns = self._computed_ns = now_ns()
        self._trace = current_context()
        self._spans = GroupSpans(Lifecycle.LEAVE, self._trace)

    async def messages(self) -> AsyncGenerator[Message, None]:
        try:
            while not self._prefilled or self._coming:
                try:
                    async with asyncio.timeout(PROGRESS_EVERY_S):
                        outputs = await self._mailbox.get()
                except TimeoutError:
                    yield self._num_done
                    continue
                for message in self._take(outputs):
                    yield message
                started = now_ns()
                for frames in self._finished_groups():
                    yield frames
                    self._spans.record(frames, started, num_bytes(frames, self._memory.groups))
                    started = now_ns()
            self._spans.end()
            yield self._commit()
        finally:
            self._end_reads(page for coming in self._coming for page in coming.pages)

    def _take(self, outputs: Iterable[Output]) -> list[Admitted]:
        """Notes all that came before anything of it is acted on: what is noted is given back."""
        admitted: list[Admitted] = []
        for output in outputs:
            match output:
                case Admitted():
                    self._computed_ns = now_ns()
                    record_stage(
                        Lifecycle.PREFILL_QUEUE, self._began_ns, self._computed_ns, self._trace
                    )
                    admitted.append(output)
                case PagesComing(_, pages, base):
                    self._expect(pages, base)
                case ChunkDone():
                    self._chunk_done(output)
                case Prefilled():
                    self._prefilled = True
                case _:
                    pass
        return admitted

    def _expect(self, pages: tuple[PageIdentity, ...], base: int) -> None:
        """Pages that have come before, of a sequence preempted since, are not wanted again."""
        old = [page for page in pages if page.page_index < self._next_page]
        self._end_reads(old)
        new = pages[len(old) :]
        if new:
            self._next_page = new[-1].page_index + 1
            self._coming.append(_Coming(new, base))

    def _chunk_done(self, chunk: ChunkDone) -> None:
        self._num_done = chunk.start + chunk.num_tokens
        self._computed_ns = chunk.ended_ns
        attributes = {"quire.start": chunk.start, "quire.tokens": chunk.num_tokens}
        record_stage(
            Lifecycle.PREFILL_CHUNK, chunk.started_ns, chunk.ended_ns, self._trace, attributes
        )

    def _finished_groups(self) -> Iterator[list[PageFrame]]:
        """Frames of all layer groups that have become final, in messages of bounded size."""
        groups, progress = self._memory.groups, self._engine.core.progress
        while self._coming:
            coming = self._coming[0]
            while coming.num_left < groups.count:
                group = coming.num_left
                if progress.num_done < coming.base + groups.layers_through(group):
                    return
                frames = [self._frame(page, group) for page in self._wanted(coming.pages)]
                coming.num_left += 1
                yield from self._messages_of(frames)
            self._coming.popleft()
            self._finish(coming.pages)

    def _frame(self, page: PageIdentity, group: int) -> PageFrame:
        payload = None
        if self._with_payload:
            payload = bytes(self._memory.group(page.reference.slot, group))
        digest = self._engine.digests.of(page, group)
        return PageFrame(page, group, self._memory.groups.count, payload, digest)

    def _messages_of(self, frames: list[PageFrame]) -> Iterator[list[PageFrame]]:
        most = max(1, MAX_MESSAGE_BYTES // self._memory.groups.num_bytes(0))
        for start in range(0, len(frames), most):
            yield frames[start : start + most]

    def _finish(self, pages: tuple[PageIdentity, ...]) -> None:
        """All layers of these pages are away."""
        digests, count = self._engine.digests, self._memory.groups.count
        for page in self._wanted(pages):
            self._seal_digests.append(digest_of(digests.of(page, group) for group in range(count)))
        self._last_name = pages[-1].reference.prefix_hash
        self._end_reads(pages)

    def _wanted(self, pages: Iterable[PageIdentity]) -> list[PageIdentity]:
        return [page for page in pages if page.page_index >= self._first_page]

    def _commit(self) -> Commit:
        return Commit(
            num_pages=self._next_page,
            num_tokens=self._num_tokens,
            pages_digest=digest_of(self._seal_digests),
            prompt_hash=self._last_name,
            since_computed_s=(now_ns() - self._computed_ns) / 1e9,
        )

    def _end_reads(self, pages: Iterable[PageIdentity]) -> None:
        slots = tuple(page.reference.slot for page in pages)
        if slots:
            self._engine.worker.post(ReadsEnded(self._name, slots))


def num_bytes(frames: Iterable[PageFrame], groups: LayerGroups) -> int:
    """What the frames stand for, whether they contain it or not."""
    return sum(groups.num_bytes(frame.layer_group) for frame in frames)
