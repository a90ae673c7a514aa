"""Export of pages: from finished pages of a sequence to the messages of a handover."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from engine.lifecycle import Lifecycle
from engine.mailbox import AsyncEngine, Mailbox
from engine.outputs import Admitted, ChunkDone, Output, PageFinished, Prefilled
from engine.scheduler import ReadsEnded
from engine.telemetry.clock import now_ns
from engine.telemetry.tracing import current_context, record_stage
from kvstore.page import Commit, PageFrame, digest_of
from kvstore.prefix_hash import ROOT

PROGRESS_EVERY_S = 0.5
Message = Admitted | PageFrame | Commit | int


class Export:
    """Turns the outputs of one prefill sequence into what is sent.

    Yields ``Admitted`` once, then frames in order of page and layer group, an ``int`` (prompt
    tokens done so far) whenever there was nothing else to say for half a second, ``Commit`` last.
    Pages before ``first_page`` are with the receiver already and are skipped.
    """

    def __init__(
        self, engine: AsyncEngine, mailbox: Mailbox, num_tokens: int, first_page: int
    ) -> None:
        self._engine = engine
        self._mailbox = mailbox
        self._num_tokens = num_tokens
        self._next_page = 0
        self._first_page = first_page
        self._num_done = 0
        self._last_name = ROOT
        self._seal_digests: list[bytes] = []
        self._began_ns = now_ns()
        self._trace = current_context()

    async def messages(self) -> AsyncGenerator[Message, None]:
        while True:
            try:
                async with asyncio.timeout(PROGRESS_EVERY_S):
                    outputs = await self._mailbox.get()
            except TimeoutError:
                yield self._num_done
                continue
            for position, output in enumerate(outputs):
                try:
                    for message in self._messages_of(output):
                        yield message
                except BaseException:
                    self._end_reads(outputs[position + 1 :])
                    raise
                if isinstance(output, Prefilled):
                    return

    def _messages_of(self, output: Output) -> list[Message]:
        match output:
            case Admitted():
                record_stage(Lifecycle.PREFILL_QUEUE, self._began_ns, now_ns(), self._trace)
                return [output]
            case ChunkDone(_, start, num_tokens, started_ns, ended_ns):
                self._num_done = start + num_tokens
                attributes = {"quire.start": start, "quire.tokens": num_tokens}
                record_stage(Lifecycle.PREFILL_CHUNK, started_ns, ended_ns, self._trace, attributes)
                return []
            case PageFinished():
                try:
                    return list(self._frames(output))
                finally:
                    self._end_reads([output])
            case Prefilled():
                return [self._commit()]
            case _:
                return []

    def _frames(self, output: PageFinished) -> list[PageFrame]:
        """The page's frames, copied out of the pool; none for a page sent before a preemption."""
        page = output.page
        identity = page.identity
        if identity.page_index != self._next_page:
            return []
        self._next_page += 1
        self._last_name = identity.reference.prefix_hash
        if identity.page_index < self._first_page:
            return []
        self._seal_digests.append(page.seal_digest)
        memory = self._engine.core.memory
        return [
            PageFrame(
                identity=identity,
                layer_group=group,
                num_layer_groups=memory.num_layer_groups,
                payload=bytes(memory.group(identity.reference.slot, group)),
                digest=digest,
            )
            for group, digest in enumerate(page.group_digests)
        ]

    def _commit(self) -> Commit:
        return Commit(
            num_pages=self._next_page,
            num_tokens=self._num_tokens,
            pages_digest=digest_of(self._seal_digests),
            prompt_hash=self._last_name,
        )

    def _end_reads(self, outputs: list[Output]) -> None:
        slots = tuple(
            output.page.identity.reference.slot
            for output in outputs
            if isinstance(output, PageFinished)
        )
        if slots:
            self._engine.worker.post(ReadsEnded(slots))
