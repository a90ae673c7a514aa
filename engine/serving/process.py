"""From a worker class and its settings to a process: logging, signals, exit code."""

from __future__ import annotations

import asyncio
import ctypes
import resource
import signal
from collections.abc import Callable

from engine.serving.server import run_service, serve
from engine.serving.settings import WorkerSettings
from engine.serving.worker import Worker
from engine.telemetry.logs import setup_logging

_PR_SET_PDEATHSIG = 1
EXIT_BROKEN = 70


def run_worker(
    role: Callable[[WorkerSettings, Callable[[], None]], Worker], settings: WorkerSettings
) -> int:
    """Runs one worker as this process; returns its exit code (0 after a clean stop)."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold prompts
    broken = False

    async def main(stop: asyncio.Event) -> None:
        nonlocal broken
        if settings.supervised:
            _leave_interrupts_to_the_parent()
        worker = role(settings, stop.set)
        setup_logging(worker.name, settings.log_level)
        await serve(worker, settings.listen, stop)
        broken = worker.broken

    code = run_service(main)
    return EXIT_BROKEN if broken else code


def _leave_interrupts_to_the_parent() -> None:
    """Ctrl-C reaches the whole process group; the parent turns it into one orderly stop."""
    asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
