"""A worker process with named places at which a test may let something happen.

``python -m tests.faults.planted prefill|decode [flags]`` runs what ``python -m prefill_svc`` or
``decode_svc`` runs. Where the worker passes a place for which ``$QUIRE_FAULTS`` (a folder) has a
file of its name, it takes the file away and does what is in it: once, even if it dies of it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "QUIRE_TEST_MONOTONIC" in os.environ:
    # Before anything else is imported: some keep the function.
    _true, _ahead = time.monotonic, float(os.environ["QUIRE_TEST_MONOTONIC"])
    time.monotonic = lambda: _true() + _ahead

from decode_svc import workers
from decode_svc.__main__ import DecodeWorker
from decode_svc.config import DecodeSettings
from engine.config import settings_from_command_line
from engine.core import EngineCore
from engine.mailbox import AsyncEngine
from engine.model.hash_model import HashModel
from engine.serving.leases import Leases
from engine.serving.process import run_worker
from kvstore.landing import Landing
from prefill_svc.__main__ import PrefillWorker
from prefill_svc.config import PrefillSettings
from prefill_svc.export import Export

FOLDER_VARIABLE = "QUIRE_FAULTS"
PACE = "pace"
PLACES = ("submit", "forward", "chunk", "frame", "committed", "landing", "verify")
# What a test waits for after a failed handover: not five seconds.
AVOID_S = 0.5


class PlantedError(RuntimeError):
    """Raised where a test asked for it."""


def reach(place: str) -> None:
    """The worker is at ``place``."""
    waiting, taken = FOLDER / place, FOLDER / f"{place}.{os.getpid()}"
    try:
        waiting.rename(taken)
    except FileNotFoundError:
        return
    act(taken.read_text())


def act(what: str) -> None:
    word, _, argument = what.partition(" ")
    match word:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "stall":  # a native call that keeps the interpreter's lock
            ctypes.PyDLL(None).usleep(int(float(argument) * 1e6))
        case "raise":
            raise PlantedError(argument)
        case _:
            raise AssertionError(what)


def keep_pace(*_: object) -> None:
    """A step takes at least the time that a test wrote down."""
    try:
        time.sleep(float((FOLDER / PACE).read_text()))
    except (FileNotFoundError, ValueError):
        return


def before(owner: type, method: str, act: Callable[..., None]) -> None:
    """``act`` runs with the method's arguments before each call of it."""
    original = getattr(owner, method)

    def planted(*arguments: Any, **named: Any) -> Any:
        act(*arguments)
        return original(*arguments, **named)

    setattr(owner, method, planted)


def after_a_chunk(core: EngineCore, *_: object) -> None:
    """Between two chunks of a prompt, not after the last."""
    if any(sequence.num_remaining > 0 for sequence in core.scheduler._sequences.values()):
        reach("chunk")


def plant() -> None:
    workers.AVOID_S = AVOID_S
    before(AsyncEngine, "submit", lambda *_: reach("submit"))
    before(HashModel, "forward", keep_pace)
    before(HashModel, "forward", lambda *_: reach("forward"))
    before(EngineCore, "_publish_chunks", after_a_chunk)
    before(Export, "_frame", lambda *_: reach("frame"))
    before(Leases, "granted", lambda *_: reach("committed"))
    before(Landing, "claim", lambda *_: reach("landing"))
    before(Landing, "finish", lambda *_: reach("verify"))


if __name__ == "__main__":
    FOLDER = Path(os.environ[FOLDER_VARIABLE])
    role = sys.argv.pop(1)
    plant()
    if role == "prefill":
        prefill_settings = settings_from_command_line(PrefillSettings, "prefill")
        sys.exit(run_worker(PrefillWorker, prefill_settings))
    decode_settings = settings_from_command_line(DecodeSettings, "decode")
    sys.exit(run_worker(DecodeWorker, decode_settings))
