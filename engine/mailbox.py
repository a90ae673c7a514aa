"""From the worker's thread to the event loop: one bounded mailbox per request."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from engine.core import EngineCore, Task
from engine.errors import EngineStopped, QuireError, ResourceExhausted
from engine.outputs import Failed, Output, PagesComing, Reserved
from engine.plan import Landed, ReadsEnded
from engine.worker import EngineWorker
from kvstore.memory import PageDigests

T = TypeVar("T")


class Mailbox:
    """Outputs of one request's sequences, in order. Beyond ``limit`` unread ones it overflows."""

    def __init__(self, names: Sequence[str], limit: int) -> None:
        self.names = tuple(names)
        self._limit = limit
        self._outputs: deque[Output] = deque()
        self._error: QuireError | None = None
        self._arrived = asyncio.Event()

    def put(self, output: Output) -> bool:
        """False if there is no room: the request has failed."""
        if len(self._outputs) >= self._limit:
            self.fail(ResourceExhausted("the client reads too slowly"))
            return False
        self._outputs.append(output)
        self._arrived.set()
        return True

    def fail(self, error: QuireError) -> None:
        self._error = self._error or error
        self._arrived.set()

    def nudge(self) -> None:
        """Lets ``get`` return: something else than an output may be new."""
        self._arrived.set()

    async def get(self) -> list[Output]:
        """All that has arrived; nothing after a nudge. Raises what the request failed with."""
        await self._arrived.wait()
        self._arrived.clear()
        if self._error is not None:
            raise self._error
        outputs = self.drain()
        for output in outputs:
            if isinstance(output, Failed):
                self.fail(output.error)
        return outputs

    def drain(self) -> list[Output]:
        outputs = list(self._outputs)
        self._outputs.clear()
        return outputs


class AsyncEngine:
    """An engine worker seen from one event loop, for which ``digests`` has its pages' digests.

    ``cache_changed`` is set when the prefix cache keeps other pages; who acts on it clears it.
    """

    def __init__(self, core: EngineCore, on_broken: Callable[[], None] | None = None) -> None:
        self.core = core
        self._loop = asyncio.get_running_loop()
        self._on_broken = on_broken
        self._mailboxes: dict[str, Mailbox] = {}
        self.digests = PageDigests(core.memory)
        self._filling: set[str] = set()
        self.cache_changed = asyncio.Event()
        self._ended: QuireError | None = None
        self.worker = EngineWorker(core, self._deliver, self._broken)

    def start(self) -> None:
        self._loop.add_reader(self.core.progress.event, self._progressed)
        self.worker.start()

    @property
    def callers(self) -> set[str]:
        """Sequences whose requests are in progress, or whose reserved pages are being filled."""
        return self._mailboxes.keys() | self._filling

    def begin_filling(self, name: str) -> None:
        """Somebody fills the sequence's reserved pages, until ``end_filling`` tells otherwise."""
        self._filling.add(name)

    def end_filling(self, name: str) -> None:
        """Nobody writes into the sequence's reserved pages now; what did not land is computed."""
        self._filling.discard(name)
        self.worker.post(Landed(name, 0))

    async def stop(self) -> None:
        self._loop.remove_reader(self.core.progress.event)
        await asyncio.to_thread(self.worker.stop)
        self.core.close()

    def open(self, names: Sequence[str], limit: int) -> Mailbox:
        """A mailbox for sequences about to be submitted; close it whatever happens."""
        mailbox = Mailbox(names, limit)
        if self._ended is not None:
            mailbox.fail(self._ended)
        self._mailboxes.update(dict.fromkeys(names, mailbox))
        return mailbox

    def submit(self, tasks: Sequence[Task]) -> None:
        self.worker.submit(tasks)

    def detach(self, mailbox: Mailbox) -> None:
        """The request is over, but the leases it left behind stay."""
        for name in mailbox.names:
            self._mailboxes.pop(name, None)
        self._give_back(mailbox.drain())

    def close(self, mailbox: Mailbox) -> None:
        """Cancels what still runs and gives back what undelivered outputs hold. Idempotent."""
        for name in mailbox.names:
            if self._mailboxes.pop(name, None) is not None:
                self.worker.cancel(name)
        self._give_back(mailbox.drain())

    def abort(self, name: str, error: QuireError) -> None:
        """Ends a sequence, or the lease it left; whoever waits for its outputs gets ``error``."""
        mailbox = self._mailboxes.get(name)
        if mailbox is not None:
            mailbox.fail(error)
        self.worker.cancel(name)

    async def call(self, function: Callable[[EngineCore], T]) -> T:
        """Runs ``function`` on the worker's thread, between two steps."""
        return await asyncio.wrap_future(self.worker.call(function))

    def _progressed(self) -> None:
        self.core.progress.hush()
        for mailbox in self._mailboxes.values():
            mailbox.nudge()

    def _deliver(self, outputs: list[Output]) -> None:
        self._loop.call_soon_threadsafe(self._dispatch, outputs)

    def _dispatch(self, outputs: Iterable[Output]) -> None:
        if self.core.pool.has_news:
            self.cache_changed.set()
        for output in outputs:
            mailbox = self._mailboxes.get(output.name)
            if mailbox is None:
                self._give_back([output])
            elif not mailbox.put(output):
                self._give_back([output])
                self.close(mailbox)

    def _give_back(self, outputs: Iterable[Output]) -> None:
        """Nobody will act on these: end the reads and writes that were begun on their behalf."""
        for output in outputs:
            if isinstance(output, PagesComing):
                slots = tuple(page.reference.slot for page in output.pages)
                self.worker.post(ReadsEnded(output.name, slots))
            if isinstance(output, Reserved):
                self.worker.post(Landed(output.name, 0))

    def _broken(self, error: BaseException) -> None:
        self._loop.call_soon_threadsafe(self._fail_all)

    def end_all(self, error: QuireError) -> None:
        """Every request, and any that still comes, ends with ``error``."""
        self._ended = self._ended or error
        for mailbox in self._mailboxes.values():
            mailbox.fail(error)

    def _fail_all(self) -> None:
        self.end_all(EngineStopped("the engine stopped"))
        if self._on_broken is not None:
            self._on_broken()
