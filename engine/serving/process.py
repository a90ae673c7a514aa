"""From a worker class and its settings to a process: logging, signals, exit code."""

from __future__ import annotations

import asyncio
import ctypes
import resource
import signal

from engine.serving.server import run_service, serve
from engine.serving.settings import WorkerSettings
from engine.serving.worker import Worker
from engine.telemetry.logs import setup_logging

_PR_SET_PDEATHSIG = 1
EXIT_BROKEN = 70


def run_worker(role: type[Worker], settings: WorkerSettings) -> int:
    """Runs one worker as this process; returns its exit code (0 after a clean stop)."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold prompts
    broken = False

    async def main(stop: asyncio.Event) -> None:
        nonlocal broken
        worker = role(settings, stop.set)
        await serve(worker, settings.listen, stop)
        broken = worker.broken

    setup_logging(role.name, settings.log_level)
    stop_signals = [signal.SIGTERM, signal.SIGINT]
    if settings.supervised:
        stop_signals.remove(signal.SIGINT)
        _depend_on_the_parent()
    code = run_service(main, stop_signals)
    return EXIT_BROKEN if broken else code


def _depend_on_the_parent() -> None:
    """Ctrl-C reaches the whole process group; the parent turns it into one orderly stop. If the
    parent dies without one, the kernel stops this process (PR_SET_PDEATHSIG, prctl(2))."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
