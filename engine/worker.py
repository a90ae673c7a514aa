"""The named thread that owns a model and its pool; everything else talks to it by messages."""

from __future__ import annotations

import atexit
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from engine.core import EngineCore, Task
from engine.outputs import Output
from engine.plan import Cancel, Event

log = logging.getLogger(__name__)
T = TypeVar("T")
Command = Callable[[EngineCore], None]


class EngineWorker:
    """Runs an ``EngineCore`` until stopped.

    ``deliver`` gets the outputs of each step, on the worker's thread, and must not block.
    ``on_broken`` is called once if the loop itself fails: the state is unknown then and the process
    should be replaced.
    """

    def __init__(
        self,
        core: EngineCore,
        deliver: Callable[[list[Output]], None],
        on_broken: Callable[[BaseException], None],
    ) -> None:
        self._core = core
        self._deliver = deliver
        self._on_broken = on_broken
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine-worker", daemon=True)

    def start(self) -> None:
        # An interpreter that exits under a running native step aborts.
        atexit.register(self.stop)
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the loop after the step in progress; sequences in it are abandoned."""
        atexit.unregister(self.stop)
        self._commands.put(None)
        self._thread.join(timeout_s)

    def submit(self, tasks: Sequence[Task]) -> None:
        self._commands.put(lambda core: core.submit(tasks))

    def post(self, *events: Event) -> None:
        def post(core: EngineCore) -> None:
            for event in events:
                core.post(event)

        self._commands.put(post)

    def cancel(self, name: str) -> None:
        """Ends a sequence or the lease it left, whatever its state; unknown names are fine."""

        def cancel(core: EngineCore) -> None:
            core.forget(name)
            core.post(Cancel(name))

        self._commands.put(cancel)

    def call(self, function: Callable[[EngineCore], T]) -> Future[T]:
        """Runs ``function`` between two steps and returns its result; not if cancelled before."""
        future: Future[T] = Future()

        def run(core: EngineCore) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(core))
            except Exception as error:
                future.set_exception(error)

        self._commands.put(run)
        return future

    def _run(self) -> None:
        try:
            busy = False
            while self._take_commands(wait=not busy):
                busy = self._core.step(self._deliver)
        except BaseException as error:
            log.exception("the engine loop failed")
            self._on_broken(error)

    def _take_commands(self, wait: bool) -> bool:
        """Carries out what has come in; False when it is time to stop."""
        while wait or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command(self._core)
            wait = False
        return True
