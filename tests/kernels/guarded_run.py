"""Runs the cases of every op on every instruction set, each pair in a child process of its own.

Writes a JSON list of how they ended. A program, because it forks: it must own all its threads.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from tempfile import TemporaryFile
from typing import Any

import torch

from kernels import _native, threads
from tests.kernels.guard_pages import AFTER_GUARD, BEFORE_GUARD, ORDINARY, Memory, overstated
from tests.kernels.guarded_ops import CASES

LIMIT_S = 60

Written = list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Ending:
    """``status`` is that of an exit, or minus the number of the signal that ended it."""

    name: str
    isa: str
    status: int
    said: str


def expected(op: str) -> list[Written]:
    """What each case writes in ordinary memory."""
    return [_run(op, case, ORDINARY) for case in CASES[op][1]]


def compare(op: str, wanted: list[Written]) -> None:
    for case, each in zip(CASES[op][1], wanted, strict=True):
        _say_only(op, *case)
        for memory in (BEFORE_GUARD, AFTER_GUARD):
            assert all(map(torch.equal, _run(op, case, memory), each)), "other memory, other bits"


def _run(op: str, case: tuple[Any, ...], memory: Memory) -> Written:
    torch.manual_seed(0)
    return [written.view(torch.uint8) for written in CASES[op][0](memory, *case)]


def _say_only(*words: object) -> None:
    """Whatever was said before is forgotten: the last case is the one of interest."""
    os.ftruncate(sys.stderr.fileno(), 0)
    os.lseek(sys.stderr.fileno(), 0, os.SEEK_SET)
    print(*words, file=sys.stderr, flush=True)


def reach_too_far(writes: bool, before: int, after: int) -> None:
    """One element beyond the 17 that an array has, which the op was told it has."""
    memory = AFTER_GUARD if before else BEFORE_GUARD
    honest = [torch.zeros(1, 18) for _ in range(3)]
    short = memory.put(torch.zeros(17))
    honest[2 if writes else 0] = overstated(short, before, after).view(1, 18)
    _native.silu_mul(*honest)


TOO_FAR = {
    "read past the end": partial(reach_too_far, writes=False, before=0, after=1),
    "read before the start": partial(reach_too_far, writes=False, before=1, after=0),
    "write past the end": partial(reach_too_far, writes=True, before=0, after=1),
    "write before the start": partial(reach_too_far, writes=True, before=1, after=0),
}


def in_child(name: str, isa: str, work: Callable[[], None]) -> Ending:
    with TemporaryFile() as said:
        child = os.fork()
        if not child:
            os.dup2(said.fileno(), sys.stderr.fileno())
            os._exit(_done(isa, work))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return Ending(name, isa, status, said.read().decode())


def _done(isa: str, work: Callable[[], None]) -> int:
    signal.alarm(LIMIT_S)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        _native.select_isa(isa)
        threads.set_num_threads(2)
        work()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    torch.set_num_threads(1)
    works = {op: partial(compare, op, expected(op)) for op in CASES} | TOO_FAR
    endings = [
        in_child(name, isa, work)
        for isa in _native.supported_isas()
        for name, work in works.items()
    ]
    json.dump([asdict(ending) for ending in endings], sys.stdout)


if __name__ == "__main__":
    main()
