"""Runs a program that ends with its parent, however the parent ends (Linux).

Run as a script, never imported by the program: it asks the kernel for SIGKILL at the parent's end
(PR_SET_PDEATHSIG, prctl(2)) and then becomes the program, under the same process id. Doing this in
a ``preexec_fn`` instead would run Python between fork and exec of a process with threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def tethered(command: Sequence[str]) -> list[str]:
    """The command line that runs ``command`` until this process ends.

    The kernel takes the *thread* that starts a child for its parent, so that must be the one that
    lasts as long as the process.
    """
    assert threading.current_thread() is threading.main_thread(), "start it from the main thread"
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def _become(parent: int, command: list[str]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        raise SystemExit("the parent ended first")
    os.execvp(command[0], command)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
