"""Workers as processes, a real Redis, and a breakable link before each of them.

::

    client --link--> decode --link--> prefill
                     decode --link--> Redis <--link-- prefill

A worker tells others the port of its link, so everything that reaches it crosses the link. Tests
look at a worker (state, pages, drain) around the link, by its own port.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc

from engine.remote import AsyncRemoteEngine
from engine.sampling_params import SamplingParams
from engine.serving.server import parse_ready_line
from kvstore.embedded import EmbeddedRedis
from kvstore.tether import tethered
from quire.v1 import admin_pb2, admin_pb2_grpc
from tests.faults.link import Link, free_port
from tests.faults.planted import FOLDER_VARIABLE, PACE, PLACES

PATIENCE_S = 60.0
START_S = 240.0  # four processes import torch at once
POLL_S = 0.02
LEASE_S = 0.6
FLAGS = {
    "model": "hash",
    "page_size": 16,
    "pool_tokens": 4096,
    "min_remote_tokens": 16,
    "lease_s": LEASE_S,
    "drain_s": 20.0,
    "check_pages": True,
}
PREFILL_ONLY = {"lease_s"}
# Of the decode workers in turn: over the network, and as the workers choose.
TRANSPORTS = ("grpc", "auto")


async def eventually(
    check: Callable[[], Awaitable[Any]], what: str, timeout_s: float = PATIENCE_S
) -> None:
    """Waits until ``await check()`` is true; fails with ``what`` was waited for."""
    try:
        async with asyncio.timeout(timeout_s):
            while not await check():  # noqa: ASYNC110 - another process has no event to offer
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"not in {timeout_s} s: {what}") from None


class WorkerProcess:
    """One worker; it may be started again, at its old port, after its end."""

    def __init__(
        self, role: str, folder: Path, link: Link, redis: Link, flags: dict[str, Any], *, real: bool
    ) -> None:
        self.role = role
        self.link = link
        self.redis = redis
        self._folder = folder
        self._flags = flags
        self._real = real
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def port(self) -> int:
        return self.link.target

    @property
    def name(self) -> str:
        return self._folder.name

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        path = self._folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self, *wrapper: str, **environment: str) -> None:
        """Starts the process, inside ``wrapper`` if there is one; ``ready`` waits for it."""
        assert not self.alive
        module = [f"{self.role}_svc"] if self._real else ["tests.faults.planted", self.role]
        command = [*wrapper, sys.executable, "-m", *module, *self._arguments()]
        environment |= {
            "GRPC_VERBOSITY": "NONE",  # gRPC reports what we break
            "QUIRE_PREFILL": "remote",  # what is broken is the way to another worker
            "PYTHONPATH": os.pathsep.join(sys.path),
            FOLDER_VARIABLE: str(self._folder),
        }
        self.disarm()
        with (self._folder / "ready").open("wb") as out, (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                tethered(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=os.environ | environment,
                start_new_session=True,
            )

    def _arguments(self) -> list[str]:
        own = {
            "redis": f"redis://{self.redis.endpoint}",
            "port": self.port,
            "advertise_port": self.link.port,
        }
        fit = {
            name: value
            for name, value in (FLAGS | self._flags | own).items()
            if self.role == "prefill" or name not in PREFILL_ONLY
        }
        return [_flag(name, value) for name, value in fit.items()]

    @property
    def serving(self) -> bool:
        """Whether the worker has said that it serves, and lives."""
        lines = (self._folder / "ready").read_text().splitlines()
        return self.alive and any(parse_ready_line(line) for line in lines)

    async def ready(self) -> None:
        """Returns when the worker serves; fails with its log if it ended instead."""

        async def said_so() -> bool:
            assert self.alive, f"{self.name} ended:\n{self.log[-2000:]}"
            return self.serving

        await eventually(said_so, f"{self.name} ready; its log:\n{self.log[-2000:]}", START_S)

    def arm(self, place: str, what: str) -> None:
        """Lets ``what`` happen when the worker is next at ``place``, see ``planted``."""
        fresh = self._folder / f"{place}.new"
        fresh.write_text(what)
        fresh.rename(self._folder / place)

    def armed(self, place: str) -> bool:
        return (self._folder / place).exists()

    def pace(self, seconds: float) -> None:
        """Every step takes that much longer."""
        (self._folder / PACE).write_text(str(seconds))

    def disarm(self) -> None:
        """Nothing more is to happen."""
        for name in (PACE, *PLACES):
            (self._folder / name).unlink(missing_ok=True)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        self.send(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    @property
    def frozen(self) -> bool:
        """Whether the kernel has the process stopped."""
        if not self.alive:
            return False
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def freeze(self) -> None:
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.send(signal.SIGCONT)

    async def ended(self, timeout_s: float = PATIENCE_S) -> int:
        """The exit code, as soon as there is one."""

        async def gone() -> bool:
            return not self.alive

        await eventually(gone, f"{self.name} gone", timeout_s)
        assert self._process is not None
        assert self._process.returncode is not None
        return self._process.returncode

    async def state(self) -> admin_pb2.GetStateResponse:
        """The worker's own account; gRPC's errors pass through."""
        async with self.channel() as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            return await stub.GetState(admin_pb2.GetStateRequest(), timeout=5)

    async def pages(self) -> list[str]:
        """Every page that somebody holds, in words."""
        async with self.channel() as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            response = await stub.ListPages(admin_pb2.ListPagesRequest(), timeout=5)
        held = [page for page in response.pages if page.reason]
        return [f"{page.slot} {page.state} {page.held_s:.1f} s: {page.reason}" for page in held]

    def channel(self) -> grpc.aio.Channel:
        """Around the link."""
        return grpc.aio.insecure_channel(
            f"127.0.0.1:{self.port}", options=[("grpc.use_local_subchannel_pool", 1)]
        )

    async def in_balance(self) -> bool:
        with suppress(grpc.aio.AioRpcError):
            state = await self.state()
            idle = state.num_running == state.num_waiting == 0
            return idle and state.pages.free + state.pages.cached_only == state.pages.total
        return False

    async def close(self) -> None:
        if self.alive:
            with suppress(ProcessLookupError):
                self.thaw()
            self.kill()
        await self.link.refuse()
        await self.redis.refuse()


class Fleet:
    """All workers of one Redis."""

    def __init__(self, folder: Path, server: EmbeddedRedis, *, real: bool = False) -> None:
        self.folder = folder
        self.server = server
        self.workers: list[WorkerProcess] = []
        self._real = real

    @property
    def prefill(self) -> list[WorkerProcess]:
        return [worker for worker in self.workers if worker.role == "prefill"]

    @property
    def decode(self) -> list[WorkerProcess]:
        return [worker for worker in self.workers if worker.role == "decode"]

    @property
    def redis_port(self) -> int:
        return int(self.server.url.rpartition(":")[2].partition("/")[0])

    async def add(self, role: str, **flags: Any) -> WorkerProcess:
        """One more worker, not yet started."""
        link = await Link.to(free_port())
        redis = await Link.to(self.redis_port)
        folder = self.folder / f"{role}-{len(self.workers)}"
        worker = WorkerProcess(role, folder, link, redis, flags, real=self._real)
        self.workers.append(worker)
        return worker

    async def remove(self, worker: WorkerProcess) -> None:
        self.workers.remove(worker)
        await worker.close()

    def client(
        self, of: Sequence[WorkerProcess] | None = None, **options: Any
    ) -> AsyncRemoteEngine:
        """A client of all decode workers, or of those given, over their links."""
        return AsyncRemoteEngine(
            [worker.link.endpoint for worker in of or self.decode],
            **({"timeout_s": 60.0} | options),
        )

    async def balanced(self, timeout_s: float = PATIENCE_S) -> None:
        """Waits until every living worker has all its pages back and nothing in progress."""
        for worker in self.workers:
            if not worker.alive:
                continue
            try:
                await eventually(worker.in_balance, "balance", timeout_s)
            except AssertionError:
                raise AssertionError(f"{worker.name}: {await worker.pages()}") from None

    async def whole(self) -> None:
        """Heals links, restarts what died; waits until all know each other and are in balance."""
        if not self.server.alive:
            self.server.start()
        for worker in self.workers:
            worker.disarm()
            worker.redis.target = self.redis_port
            await worker.link.heal()
            await worker.redis.heal()
            if not worker.alive:
                worker.start()
        for worker in self.workers:
            await worker.ready()
        if self.prefill:
            for worker in self.decode:
                await self.hands_over(worker)
        await self.balanced()

    async def hands_over(self, decode: WorkerProcess) -> None:
        """Waits until a fresh prompt of this decode worker is computed by a prefill worker."""

        async def remote() -> bool:
            async with self.client([decode], timeout_s=10.0) as client:
                (found,) = await client.generate(
                    [fresh_prompt()], SamplingParams(temperature=0, max_tokens=1)
                )
                return found.prefilled == "remote"

        await eventually(remote, f"{decode.name} hands over; its log:\n{decode.log[-2000:]}")

    async def close(self) -> None:
        for worker in self.workers:
            await worker.close()


@asynccontextmanager
async def fleet_of(
    folder: Path, num_prefill: int, num_decode: int, *, real: bool = False, **flags: Any
) -> AsyncIterator[Fleet]:
    """Workers that serve and know each other, and a Redis of their own."""
    server = EmbeddedRedis(folder / "redis", port=free_port())
    server.start()
    fleet = Fleet(folder, server, real=real)
    try:
        for _ in range(num_prefill):
            await fleet.add("prefill", **flags)
        for number in range(num_decode):
            await fleet.add("decode", transports=TRANSPORTS[number % len(TRANSPORTS)], **flags)
        await fleet.whole()
        yield fleet
    finally:
        await fleet.close()
        server.stop()


def fresh_prompt(num_tokens: int = 100) -> tuple[int, ...]:
    """A prompt that no cache has seen."""
    return (*secrets.token_bytes(16), *(number % 250 for number in range(num_tokens - 16)))


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={value}"
