"""The real workers inside the simulation, with a virtual thread and a faulty index."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import grpc

from decode_svc.__main__ import DecodeWorker
from decode_svc.config import DecodeSettings
from engine import mailbox as mailbox_module
from engine.core import EngineCore
from engine.outputs import Output
from engine.serving import server as serving
from engine.serving import worker as worker_module
from engine.serving.worker import Worker
from engine.worker import Command, EngineWorker
from kvstore.index import IndexUnavailable
from kvstore.index.memory import MemoryPageIndex
from kvstore.ledger import PageState
from prefill_svc.__main__ import PrefillWorker
from prefill_svc.config import PrefillSettings
from tests.simulation.network import Network
from tests.simulation.page_model import LOADED
from tests.simulation.process import Clock, Process, current_process
from tests.simulation.scenario import PAGE_SIZE, Fault, Setup

INDEX_TIMEOUT_S = 0.2
PAGE_BYTES = LOADED.model.spec.page_layout(PAGE_SIZE).page_bytes


class Inbox:
    """The worker's queue of commands; a new one wakes its thread."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._commands: deque[Command | None] = deque()
        self._wake = wake

    def put(self, command: Command | None) -> None:
        self._commands.append(command)
        self._wake()

    def get(self) -> Command | None:
        return self._commands.popleft()

    def empty(self) -> bool:
        return not self._commands


class VirtualEngineWorker(EngineWorker):
    """The engine's thread as turns of the simulation: a step takes some time, and what it has to
    tell arrives a little later, in order."""

    network: Network
    max_step_s: float
    stepped: Callable[[Process, EngineCore], None]
    broke: Callable[[Process, Exception], None]

    def __init__(
        self,
        core: EngineCore,
        deliver: Callable[[list[Output]], None],
        on_broken: Callable[[BaseException], None],
    ) -> None:
        super().__init__(core, self._deliver_later, on_broken)
        self._deliver_now = deliver
        self._process = current_process()
        self._commands = Inbox(self._wake)  # type: ignore[assignment]
        self._turn: asyncio.TimerHandle | None = None
        self._num_turns = 0
        self._last_delivery = 0.0
        self._step_ends = 0.0
        self._stopped = False

    def start(self) -> None: ...

    def stop(self, timeout_s: float = 10.0) -> None:
        if self._turn is not None:
            self._turn.cancel()
        self._stopped = True

    def _wake(self) -> None:
        if self._turn is None and not self._stopped:
            loop = self.network.loop
            self._turn = loop.at(max(loop.now, self._step_ends), self._take_turn)

    def _take_turn(self) -> None:
        loop, process = self.network.loop, self._process
        self._turn = None
        if not process.alive:
            return
        thawed = process.thawed(loop.now)
        if thawed > loop.now:
            self._turn = loop.at(thawed, self._take_turn)
            return
        self._num_turns += 1
        took = self.max_step_s * self._chance("step")
        self._step_ends = loop.now + took
        try:
            self._take_commands(wait=False)
            busy = self._core.step(self._deliver)
        except Exception as error:
            self.broke(process, error)
            self._on_broken(error)
            self.stop()
            return
        self.stepped(process, self._core)
        if busy or not self._commands.empty():
            self._wake()

    def _deliver_later(self, outputs: list[Output]) -> None:
        loop = self.network.loop
        arrival = loop.now + self.max_step_s * self._chance("outputs", len(outputs))
        self._last_delivery = max(arrival, self._last_delivery + 1e-6)
        loop.at(self._last_delivery, self._deliver_now, outputs)

    def _chance(self, *what: object) -> float:
        process = self._process
        return self.network.chance(process.name, process.life, self._num_turns, *what)


class FaultyIndex:
    """A page index as one process sees it: far away, sometimes silent."""

    def __init__(self, server: IndexServer, process: Process) -> None:
        self._server = server
        self._process = process

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any) -> Any:
            return await self._server.call(self._process, name, args)

        return call

    async def close(self) -> None: ...


class IndexServer:
    """What stands for Redis. ``outages`` are faults that say when it is not heard."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._num_calls = 0
        self.outages: list[Fault] = []
        self.forget()

    def forget(self) -> None:
        """Starts again, empty."""
        self._index = MemoryPageIndex(lambda: self._network.loop.now)

    async def call(self, process: Process, name: str, args: tuple[Any, ...]) -> Any:
        network = self._network
        self._num_calls += 1
        if not process.alive:
            raise IndexUnavailable("this process is dead")
        await asyncio.sleep(network.max_latency_s * network.chance("index", self._num_calls))
        outage = self._outage(process)
        if outage is not None and outage.kind == "no_index":
            network.reached("the index was away")
            await asyncio.sleep(INDEX_TIMEOUT_S)
            raise IndexUnavailable("no answer")
        result = await getattr(self._index, name)(*args)
        if outage is not None:
            network.reached("the index acted and was not heard")
            raise IndexUnavailable("no answer")
        return result

    def _outage(self, process: Process) -> Fault | None:
        now = self._network.loop.now
        for fault in self.outages:
            if fault.at <= now < fault.at + fault.seconds and fault.node in ("", process.name):
                return fault
        return None


class Service:
    """One of the services, through its lives."""

    def __init__(
        self, name: str, network: Network, index: IndexServer, setup: Setup, clock: Clock
    ) -> None:
        self.name = name
        self.endpoint = f"{name}:1"
        self.frozen: tuple[tuple[float, float], ...] = ()
        self.clock = clock
        self.process = Process(name, alive=False)
        self.worker: Worker | None = None
        self._network = network
        self._index = index
        self._setup = setup
        self._num_lives = 0

    async def start(self) -> None:
        """A new life: another boot identity, empty pages, the same endpoint."""
        self._num_lives += 1
        self.process = Process(self.name, self._num_lives, self.frozen, clock=self.clock)
        self._network.listening[self.endpoint] = self.process
        starting = self.process.run(self._start())
        await asyncio.wait({starting})
        if not starting.cancelled():  # it may die before it serves
            starting.result()

    async def _start(self) -> None:
        process = self.process
        role, settings = self._role()
        worker = role(settings, lambda: None)
        worker.index = FaultyIndex(self._index, process)
        self.worker = worker

        def handler(path: str) -> Any:
            return worker._handlers.service(_Details(path))

        process.handler = handler
        await worker.warm(self.endpoint)

    def crash(self) -> None:
        self._network.trace("crash", self.name)
        self.process.die()
        self._network.disconnect(self.process)

    async def drain(self) -> None:
        """The way out that a signal begins, to the end of the process."""
        process, worker = self.process, self.worker
        assert worker is not None
        calls: Any = _CallsServed(self._network, process)
        leaving = process.run(serving._drain(worker, calls, self._setup.drain_s))
        await asyncio.wait({leaving})
        if not process.alive:  # it died on the way
            return
        leaving.result()
        self._network.disconnect(process)
        await asyncio.wait({process.run(worker.release())})
        process.die()

    async def stop(self) -> None:
        """The orderly end."""
        if self.process.alive and self.worker is not None:
            await self.process.run(self.worker.release())

    def held(self) -> list[str]:
        """What is not given back, in words; nothing when the service is at rest."""
        worker = self.worker
        if not self.process.alive or worker is None or worker.state != "serving":
            return []
        core = worker.engine.core
        pool, ledger = core.pool, core.pool.ledger
        found = [f"sequence {name}" for name in core.scheduler._sequences]
        found += [
            f"page {slot}: {ledger[slot].reason}" for slot in range(len(ledger))
            if ledger[slot].held or ledger[slot].state is PageState.QUARANTINED
        ]  # fmt: skip
        if ledger.num_free + pool.num_idle != pool.num_pages:
            found.append(f"{ledger.num_free} free and {pool.num_idle} idle of {pool.num_pages}")
        found += [f"mailbox of {name}" for name in worker.engine._mailboxes]
        found += [f"swapped page of {name}" for name in core.scheduler.swap.holders()]
        found += [f"page lease {each.hex()}" for each in worker.page_leases._current]
        found += [f"hold {slots}" for slots in core.scheduler._writing.values()]
        if isinstance(worker, PrefillWorker):
            servicer = worker._servicer
            found += [f"handover {each.hex()}" for each in servicer._handovers._current]
            found += [f"{servicer.num_active} prompts"] * bool(servicer.num_active)
            found += [f"{servicer.queued_tokens} tokens"] * bool(servicer.queued_tokens)
        if isinstance(worker, DecodeWorker):
            admission = worker._admission
            found += [f"{admission.num_requests} requests"] * bool(admission.num_requests)
            found += [f"{admission.queued_tokens} tokens"] * bool(admission.queued_tokens)
        return [f"{self.name}: {each}" for each in found]

    def outcomes(self) -> dict[str, int]:
        """How handovers ended here, by the word that the metric has for it."""
        return self._counted("handovers")

    def pulls(self) -> dict[str, int]:
        """How reads of cached pages ended here, likewise."""
        return self._counted("pulls")

    def leases(self) -> dict[str, int]:
        """What was said to whoever asked for cached pages here."""
        return self._counted("leases")

    def _counted(self, name: str) -> dict[str, int]:
        if self.worker is None:
            return {}
        (metric,) = getattr(self.worker.metrics, name).collect()
        return {
            next(iter(sample.labels.values())): int(sample.value)
            for sample in metric.samples
            if sample.name.endswith("_total")
        }

    def _role(self) -> tuple[Any, Any]:
        setup = self._setup
        common: dict[str, Any] = {
            "model": "pages",
            "transports": ("grpc",),
            "page_size": PAGE_SIZE,
            "max_sequences": setup.max_sequences,
            "max_step_tokens": max(setup.chunk_tokens, setup.max_sequences),
            "chunk_tokens": setup.chunk_tokens,
            "min_remote_tokens": setup.min_remote_tokens,
            "check_pages": True,
            "page_lease_s": setup.page_lease_s,
        }
        if self.name.startswith("prefill"):
            tokens = setup.prefill_pages * PAGE_SIZE
            return PrefillWorker, PrefillSettings(
                pool_tokens=tokens,
                lease_s=setup.lease_s,
                max_requests=setup.max_prompts,
                **common,
            )
        tokens = setup.decode_pages * PAGE_SIZE
        return DecodeWorker, DecodeSettings(
            pool_tokens=tokens,
            swap_bytes=setup.swap_pages * PAGE_BYTES,
            handover_idle_s=setup.handover_idle_s,
            prefill=setup.prefer,  # which way is fastest is no matter here
            **common,
        )


class _CallsServed:
    """Stands for ``RunningCalls``."""

    def __init__(self, network: Network, process: Process) -> None:
        self._network = network
        self._process = process
        self.num_running = 0

    async def wait_idle(self) -> None:
        await self._network.served(self._process)


class _Details(grpc.HandlerCallDetails):
    def __init__(self, method: str) -> None:
        self.method = method
        self.invocation_metadata = ()


def in_simulation() -> list[Any]:
    """Patches that put the simulated parts in place of the real ones."""
    return [
        patch.object(mailbox_module, "EngineWorker", VirtualEngineWorker),
        patch.object(worker_module, "load_model", lambda *_, **__: LOADED),
    ]
