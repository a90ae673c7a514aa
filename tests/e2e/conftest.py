"""Real processes: `quire up` in a state folder of its own, and the command line against it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from quire.v1 import admin_pb2, admin_pb2_grpc

QUIRE = [sys.executable, "-m", "engine.cli.main"]
START_TIMEOUT_S = 90.0
PATIENCE_S = 60.0


@dataclass
class Up:
    """One running `quire up`."""

    process: subprocess.Popen[str]
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"QUIRE_STATE_DIR": str(self.folder)}

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "up.json").read_text())
        return found

    def pid_of(self, role: str) -> int:
        return next(each["pid"] for each in self.state["services"] if each["role"] == role)

    def endpoint_of(self, role: str) -> str:
        return next(each["endpoint"] for each in self.state["services"] if each["role"] == role)

    def pages_of(self, role: str) -> admin_pb2.ListPagesResponse:
        """What a worker holds, asked from here: `quire pages` takes seconds to start, in which what
        a test waits for may have come and gone."""
        with grpc.insecure_channel(self.endpoint_of(role)) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            return stub.ListPages(admin_pb2.ListPagesRequest(), timeout=PATIENCE_S)

    def runs_something(self) -> bool:
        """Whether a sequence owns pages in the decode service."""
        return any(page.owners for page in self.pages_of("decode").pages)

    def holds_nothing(self) -> bool:
        """Whether all pages of both services are free, or kept by the prefix cache alone."""
        pages = [page for role in ("prefill", "decode") for page in self.pages_of(role).pages]
        return all(page.reason == "kept by the prefix cache" for page in pages)

    def hands_over(self) -> bool:
        """Whether a prompt that no cache has seen is prefilled by the prefill service."""
        prompt = os.urandom(4).hex() * 40
        return bool(self.generate("--prompt", prompt, "--max-tokens", "1")["prefilled"] == "remote")

    @contextmanager
    def unsupervised(self) -> Iterator[None]:
        """While the block runs, what dies stays dead."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def log_of(self, role: str) -> str:
        """What the services of a role have logged, to explain a failed assertion."""
        return "".join(path.read_text() for path in (self.folder / "logs").glob(f"{role}-*.log"))

    def quire(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*QUIRE, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def generate(self, *arguments: str) -> dict[str, Any]:
        result = self.quire("generate", *arguments, "--json")
        assert result.returncode == 0, result.stderr
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    def stop(self, number: int = signal.SIGTERM, timeout: float = PATIENCE_S) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout)


def wait_until(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Waits until the condition is true; fails if it never is."""
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up, "it never came true"
        time.sleep(0.05)


def start_up(folder: Path, *flags: str, **settings: str) -> Up:
    """Starts `quire up` and waits until everything is ready; ``settings`` go by environment.

    Prompts go to a prefill worker wherever possible: which way is fastest here is no matter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output = (folder / "up.out").open("w")
    with output:
        process = subprocess.Popen(
            [*QUIRE, "up", *flags],
            env=os.environ | {"QUIRE_STATE_DIR": str(folder), "QUIRE_PREFILL": "remote"} | settings,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    up = Up(process, folder)
    wait_until(lambda: (folder / "up.json").exists() or process.poll() is not None, START_TIMEOUT_S)
    assert process.poll() is None, (folder / "up.out").read_text()
    return up


@pytest.fixture(scope="module")
def hash_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Services of the hash model."""
    up = start_up(tmp_path_factory.mktemp("up"), "--model", "hash", "--page-size", "16")
    yield up
    assert up.stop() == 0


@pytest.fixture(scope="module")
def smollm2_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Services of the real model."""
    up = start_up(tmp_path_factory.mktemp("up"), "--pool-tokens", "4096")
    yield up
    assert up.stop() == 0
