"""A process of the simulation: the tasks that die with it, and the times when it stands still."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

_current: contextvars.ContextVar[Process] = contextvars.ContextVar("process")


def current_process() -> Process:
    """Whose code is running."""
    return _current.get()


@dataclass
class Clock:
    """A process's clocks: seconds of its own for each of the simulation's, from another start, and
    a wall clock that somebody may set."""

    offset_s: float = 0.0
    rate: float = 1.0
    wall_shift_s: float = 0.0

    def local(self, now: float) -> float:
        return self.offset_s + self.rate * now

    def of_all(self, local: float) -> float:
        """The simulation's time when the monotonic clock shows ``local``."""
        return (local - self.offset_s) / self.rate


_TRUE = Clock()


def current_clock() -> Clock:
    """The clocks of whose code is running; outside of all processes, the simulation's."""
    process = _current.get(None)
    return _TRUE if process is None else process.clock


@dataclass(eq=False)
class Process:
    """One life of one process: a service that is started again is another one.

    ``frozen`` are spans of time in which nothing comes in or goes out.
    """

    name: str
    life: int = 0
    frozen: tuple[tuple[float, float], ...] = ()
    alive: bool = True
    clock: Clock = field(default_factory=Clock)
    handler: Callable[[str], Any] = field(default=lambda path: None)
    tasks: dict[asyncio.Task[Any], None] = field(default_factory=dict)

    def thawed(self, time: float) -> float:
        """The first moment from ``time`` on at which the process runs."""
        for start, end in self.frozen:
            if start <= time < end:
                time = end
        return time

    def run(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Runs ``work`` as a task of this process."""
        context = contextvars.copy_context()
        context.run(_current.set, self)
        return asyncio.get_running_loop().create_task(work, context=context)

    def die(self) -> None:
        """Nothing of it has any effect from now on."""
        self.alive = False
        for task in list(self.tasks):
            task.cancel()


def task_of_process(
    loop: asyncio.AbstractEventLoop, work: Any, context: contextvars.Context | None = None
) -> asyncio.Task[Any]:
    """A task factory that notes whose each task is."""
    process = (context or contextvars.copy_context()).get(_current)
    if process is None:
        return asyncio.Task(work, loop=loop, context=context)
    task = asyncio.Task(work, loop=loop, context=context)
    process.tasks[task] = None
    task.add_done_callback(process.tasks.pop)
    return task
