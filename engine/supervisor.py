"""Runs Redis and the services of one machine as child processes, and keeps them running.

A child that dies is started again on its old port, after a pause that doubles with every death in a
row. Children share the parent's process group but leave Ctrl-C to it; they end when it ends.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import PeerUnavailable
from engine.serving.server import parse_ready_line
from engine.state import ServiceEntry, UpState, remove_up_state, write_up_state
from kvstore.embedded import EmbeddedRedis

READY_TIMEOUT_S = 600.0
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0
HEALTHY_AFTER_S = 30.0
KILL_AFTER_S = 5.0
LOG_TAIL_LINES = 15
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """A service to run: its role, module and flags."""

    role: str
    module: str
    flags: tuple[str, ...]


@dataclass
class _Child:
    plan: ServicePlan
    log_path: Path
    process: subprocess.Popen[str] | None = None
    endpoint: str = ""
    started: float = 0.0
    restart_at: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    ready: threading.Event = field(default_factory=threading.Event)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        self.ready.clear()
        self.started = time.monotonic()
        self.restart_at = 0.0
        command = [sys.executable, "-m", self.plan.module, *self.plan.flags, "--supervised"]
        if self.endpoint:
            command.append(f"--port={self.endpoint.rpartition(':')[2]}")
        with self.log_path.open("a") as log_file:
            self.process = subprocess.Popen(
                command,
                env=os.environ | {"GRPC_VERBOSITY": "NONE"},  # gRPC reports what we handle
                stdout=subprocess.PIPE,
                stderr=log_file,
                stdin=subprocess.DEVNULL,
                text=True,
            )
        threading.Thread(target=self._watch_output, args=(self.process,), daemon=True).start()

    def ask_to_stop(self) -> None:
        """Once only: a second signal would end the child at once."""
        if self.process is not None and self.alive:
            self.process.terminate()

    def wait(self, grace_s: float) -> int:
        """The child's exit code; it is killed after ``grace_s``."""
        if self.process is None:
            return 0
        try:
            return self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def log_tail(self) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    def _watch_output(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                found = parse_ready_line(line)
                if found is not None:
                    self.endpoint = found[1]
                    self.ready.set()


class Supervisor:
    """Redis (unless ``redis_url`` names one) and the planned services, from start to stop."""

    def __init__(
        self,
        folder: Path,
        plans: Callable[[str], Sequence[ServicePlan]],
        redis_url: str,
        drain_s: float,
    ) -> None:
        self._folder = folder
        self._plans = plans
        self._redis_url = redis_url
        self._redis = None if redis_url else EmbeddedRedis(folder / "redis")
        self._drain_s = drain_s
        self._children: list[_Child] = []

    @property
    def state(self) -> UpState:
        services = tuple(
            ServiceEntry(child.plan.role, child.process.pid, child.endpoint)
            for child in self._children
            if child.process is not None
        )
        return UpState(self._redis_url, services)

    def start(self, stopping: Callable[[], bool]) -> None:
        """Returns when all services are ready. Raises PeerUnavailable with the end of a log."""
        if self._redis is not None:
            self._redis.start()
            self._redis_url = self._redis.url
        logs = self._folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        for number, plan in enumerate(self._plans(self._redis_url)):
            log_path = logs / f"{plan.role}-{number}.log"
            log_path.write_text("")
            child = _Child(plan, log_path)
            self._children.append(child)
            child.start()
        for child in self._children:
            self._await_ready(child, stopping)
        write_up_state(self.state, self._folder)

    def keep_running(self, stopping: Callable[[], bool]) -> None:
        """Restarts what dies until told to stop."""
        while not stopping():
            changed = [self._revive(child) for child in self._children]
            if self._redis is not None and not self._redis.alive:
                log.warning("redis died; starting it again")
                self._redis.start()
            if any(changed):
                write_up_state(self.state, self._folder)
            time.sleep(0.1)

    def stop(self) -> int:
        """Decode services first, they may need the others; returns 0 if all ended well."""
        remove_up_state(self._folder)
        codes = []
        for role in ("decode", "prefill"):
            group = [child for child in self._children if child.plan.role == role]
            for child in group:
                child.ask_to_stop()
            codes += [child.wait(self._drain_s + KILL_AFTER_S) for child in group]
        if self._redis is not None:
            self._redis.stop()
        return 0 if all(code == 0 for code in codes) else 1

    def _await_ready(self, child: _Child, stopping: Callable[[], bool]) -> None:
        give_up = time.monotonic() + READY_TIMEOUT_S
        while not child.ready.wait(0.1):
            if stopping():
                raise KeyboardInterrupt
            if not child.alive or time.monotonic() > give_up:
                raise PeerUnavailable(
                    f"the {child.plan.role} service did not start:\n{child.log_tail()}"
                )

    def _revive(self, child: _Child) -> bool:
        """Starts a dead child when its pause is over; whether it did."""
        now = time.monotonic()
        if child.alive:
            return False
        if not child.restart_at:
            assert child.process is not None
            code = child.process.returncode
            if code == 0:  # It was drained, and has nothing against another start.
                log.warning("%s service was drained; starting it again", child.plan.role)
                child.start()
                return True
            if now - child.started > HEALTHY_AFTER_S:
                child.pause_s = FIRST_PAUSE_S
            child.restart_at = now + child.pause_s
            child.pause_s = min(child.pause_s * 2, LONGEST_PAUSE_S)
            log.warning("%s service died with code %s; starting it again", child.plan.role, code)
            return False
        if now < child.restart_at:
            return False
        child.start()
        return True


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds the state folder for one ``quire up`` at a time. Raises PeerUnavailable."""
    import fcntl

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise PeerUnavailable(f"another `quire up` uses {folder}; see QUIRE_STATE_DIR") from None
    finally:
        os.close(handle)
