"""One simulation from start to end, and what must hold in it.

Two times the same scenario is two times the same history: the trace's digest tells.
"""

from __future__ import annotations

import asyncio
import itertools
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import grpc
import xxhash

from engine.completion import Finished
from engine.core import EngineCore
from engine.serving.leases import Leases
from engine.serving.pages import PageServicer, lent_name
from kvstore import memory as memory_module
from kvstore.ledger import PageState
from kvstore.page import PageFrame
from kvstore.swap import MemoryRoom
from tests.simulation.chance import Chance
from tests.simulation.client import answer_to, problems_of
from tests.simulation.errors_logged import errors_logged
from tests.simulation.network import Network
from tests.simulation.process import Clock, Process, task_of_process
from tests.simulation.reference import expected_tokens
from tests.simulation.scenario import Ask, Fault, Scenario
from tests.simulation.services import (
    PAGE_BYTES,
    IndexServer,
    Service,
    VirtualEngineWorker,
    in_simulation,
)
from tests.simulation.virtual_time import VirtualLoop, running, virtual_time

# A failed handover for which the wire need not be at fault.
HONEST_REASONS = frozenset(
    {"landed", "committed", "no_worker", "silent", "unavailable", "cancelled", "boot_id"}
    | {"deadline_exceeded", "resource_exhausted", "incomplete", "aborted", "invalid_argument"}
)
HONEST_PULLS = HONEST_REASONS | {"absent", "busy", "failed_precondition", "lease_over"}
CORRUPTING = frozenset({"flip", "swap", "twice"})
SPARE_S = 5.0


@dataclass
class Result:
    """``problems`` is empty if everything held; ``digest`` names the history."""

    problems: list[str] = field(default_factory=list)
    reached: set[str] = field(default_factory=set)
    digest: str = ""
    lines: list[str] = field(default_factory=list)


def simulate(scenario: Scenario, keep_lines: bool = False) -> Result:
    """Runs a scenario; with ``keep_lines`` the result tells what happened, line by line."""
    return _World(scenario, keep_lines).run()


class _World:
    def __init__(self, scenario: Scenario, keep_lines: bool) -> None:
        self.scenario = scenario
        self.result = Result()
        self._keep_lines = keep_lines
        self._digest = xxhash.xxh3_128()
        self._loop = VirtualLoop()
        self._loop.set_task_factory(task_of_process)
        self._loop.set_exception_handler(self._unhandled)
        setup = scenario.setup
        self._network = Network(
            self._loop, Chance(scenario.seed), setup.max_latency_s, scenario.faults
        )
        self._network.trace = self._trace
        self._network.reached = self.result.reached.add
        self._index = IndexServer(self._network)
        names = [f"prefill{number}" for number in range(setup.num_prefill)]
        names += [f"decode{number}" for number in range(setup.num_decode)]
        self._services = {
            name: Service(name, self._network, self._index, setup, self._clock_of(name))
            for name in names
        }
        self._client = Process("client")

    def _clock_of(self, name: str) -> Clock:
        """Of another start and rate in every process, if the scenario says so."""
        if not self.scenario.setup.clocks_differ:
            return Clock()
        between = self._network.chance.between
        return Clock(between(0.0, 1e5, name, "offset"), between(0.9, 1.1, name, "rate"))

    def run(self) -> Result:
        loop, scenario = self._loop, self.scenario
        for ask in scenario.asks:  # found once and remembered: not under this world's clock
            for choice in range(ask.choices):
                expected_tokens(ask, choice)
        with ExitStack() as stack:
            stack.enter_context(virtual_time(loop, scenario.seed))
            for each in in_simulation():
                stack.enter_context(each)
            stack.enter_context(self._wired())
            stack.enter_context(errors_logged(self._problem))
            stack.enter_context(running(loop))
            try:
                loop.run_until_complete(self._main())
            except Exception as error:
                self._problem(f"the simulation broke: {error!r}")
            self._end_tasks()
        self.result.digest = self._digest.hexdigest()
        return self.result

    @contextmanager
    def _wired(self) -> Iterator[None]:
        """Lets the patched parts find this world."""
        setup = self.scenario.setup
        expire, read = Leases.expire, MemoryRoom.read
        damage = {
            fault.call: fault.bit for fault in self.scenario.faults if fault.kind == "bad_swap"
        }
        num_reads = itertools.count()

        def noted_expire(handovers: Leases) -> int:
            num_over = expire(handovers)
            if num_over:
                self.result.reached.add("a lease ran out")
            return num_over

        def damaged_read(room: MemoryRoom, slot: int, target: memoryview) -> None:
            read(room, slot, target)
            bit = damage.get(next(num_reads))
            if bit is not None:
                target[bit // 8 % len(target)] ^= 1 << bit % 8

        send = PageServicer._with_payload

        def noted_send(servicer: PageServicer, frame: PageFrame) -> PageFrame:
            core, slot = servicer._engine.core, frame.identity.reference.slot
            holders = core.pool.ledger[slot].leases
            if not any(holder.startswith(lent_name("")) for holder in holders):
                self._problem(f"page {slot} is read out of a cache without a lease")
            return send(servicer, frame)

        with (
            patch.object(PageServicer, "_with_payload", noted_send),
            patch.object(MemoryRoom, "read", damaged_read),
            patch.object(VirtualEngineWorker, "network", self._network, create=True),
            patch.object(VirtualEngineWorker, "max_step_s", setup.max_step_s, create=True),
            patch.object(VirtualEngineWorker, "stepped", self._stepped, create=True),
            patch.object(VirtualEngineWorker, "broke", self._broke, create=True),
            patch.object(grpc.aio, "insecure_channel", self._network.open_channel),
            patch.object(Leases, "expire", noted_expire),
            patch.object(memory_module, "MAX_GROUP_BYTES", PAGE_BYTES // setup.num_layer_groups),
        ):
            yield

    async def _main(self) -> None:
        await asyncio.gather(*[service.start() for service in self._services.values()])
        began = self._loop.now
        tasks = [asyncio.ensure_future(self._happen(fault, began)) for fault in self._timed()]
        asks = [
            self._client.run(self._ask(number, ask, began))
            for number, ask in enumerate(self.scenario.asks)
        ]
        await asyncio.gather(*asks, *tasks)
        await self._rest()
        for service in self._services.values():
            self._note_outcomes(service)
            await service.stop()

    # -- requests

    async def _ask(self, number: int, ask: Ask, began: float) -> None:
        await asyncio.sleep(began + ask.at - self._loop.now)
        answer = await answer_to(ask, self._decode_endpoints(ask.decode))
        self._trace("request over", number, answer.end, answer.tokens)
        self.result.reached.add(f"request {answer.end}")
        for problem in problems_of(ask, answer, self.scenario):
            self._problem(f"request {number} {problem}")
        late = self._loop.now - (began + ask.at + ask.timeout_s)
        if late > 1.0:
            self._problem(f"request {number} ended {late} s after its deadline")
        if answer.finished is not None:
            self._note_usage(answer.finished)

    def _decode_endpoints(self, first: int) -> list[str]:
        """All of them, from one on."""
        names = [name for name in self._services if name.startswith("decode")]
        return [self._services[name].endpoint for name in names[first:] + names[:first]]

    # -- faults

    def _timed(self) -> list[Fault]:
        return [fault for fault in self.scenario.faults if fault.at]

    async def _happen(self, fault: Fault, began: float) -> None:
        at = began + fault.at
        match fault.kind:
            case "freeze":
                service = self._services[fault.node]
                service.frozen += ((at, at + fault.seconds),)
                service.process.frozen = service.frozen
                await asyncio.sleep(at + fault.seconds - self._loop.now)
                self.result.reached.add(f"a {fault.node[:-1]} stood still")
            case "no_index" | "unheard":
                self._index.outages.append(
                    Fault(fault.kind, fault.node, at=at, seconds=fault.seconds)
                )
                await asyncio.sleep(at + fault.seconds - self._loop.now)
            case "empty_index":
                await asyncio.sleep(at - self._loop.now)
                self._index.forget()
            case "set_clock":
                await asyncio.sleep(at - self._loop.now)
                self._services[fault.node].clock.wall_shift_s += fault.seconds
                self.result.reached.add("a wall clock was set")
            case "drain":
                await asyncio.sleep(at - self._loop.now)
                await self._drain(self._services[fault.node], fault.seconds)
            case "crash":
                await asyncio.sleep(at - self._loop.now)
                await self._crash(self._services[fault.node], fault.seconds)

    async def _crash(self, service: Service, seconds: float) -> None:
        if not service.process.alive:
            return
        for route in set(self._network.busy_with(service.process)):
            self.result.reached.add(f"a {service.name[:-1]} died in {route}")
        self._note_outcomes(service)
        service.crash()
        await asyncio.sleep(seconds)
        await service.start()

    async def _drain(self, service: Service, seconds: float) -> None:
        process, worker = service.process, service.worker
        if not process.alive or worker is None or worker.state != "serving":
            return
        for route in set(self._network.busy_with(process)):
            self.result.reached.add(f"a {service.name[:-1]} drained in {route}")
        await service.drain()
        self._note_outcomes(service)
        await asyncio.sleep(seconds)
        if service.process is process:
            await service.start()

    # -- what must hold

    def _stepped(self, process: Process, core: EngineCore) -> None:
        """After each step; the pool has checked itself in it."""
        pool = core.pool
        if pool.ledger.count(PageState.QUARANTINED):
            self.result.reached.add("a page waited for its reader or writer")
        if core.totals.swapped_in:
            self.result.reached.add("pages came back from swap")
        if core.totals.swap_lost:
            self.result.reached.add("a damaged page in swap was computed again")
        self._trace(process.name, core.totals.steps, core.totals.step_rows, pool.num_available)

    def _broke(self, process: Process, error: Exception) -> None:
        where = traceback.extract_tb(error.__traceback__)[-1]
        self._problem(f"{process.name} broke at {where.name}: {where.line}: {error!r}")

    async def _rest(self) -> None:
        """Everything is given back soon after the last request, whatever happened."""
        setup = self.scenario.setup
        leases_s = 2 * (setup.lease_s + setup.page_lease_s)
        until = self._loop.now + leases_s + setup.handover_idle_s + SPARE_S
        while held := self._held():
            if self._loop.now > until:
                for each in held:
                    self._problem(f"not given back: {each}")
                return
            await asyncio.sleep(0.1)

    def _held(self) -> list[str]:
        return [each for service in self._services.values() for each in service.held()]

    def _note_outcomes(self, service: Service) -> None:
        kinds = {fault.kind for fault in self.scenario.faults}
        for reason, count in service.outcomes().items():
            if not count:
                continue
            self.result.reached.add(f"handover {reason}")
            if reason not in HONEST_REASONS and not kinds & CORRUPTING:
                self._problem(f"{service.name}: a handover failed for {reason}")

        for reason, count in service.pulls().items():
            if not count:
                continue
            self.result.reached.add(f"pull {reason}")
            if reason not in HONEST_PULLS and not kinds & CORRUPTING:
                self._problem(f"{service.name}: a pull failed for {reason}")
        for answer, count in service.leases().items():
            if count:
                self.result.reached.add(f"lease {answer}")

    def _note_usage(self, finished: Finished) -> None:
        usage = finished.usage
        for what, count in (
            ("preempted", usage.preemptions),
            ("found in the cache", usage.cached_tokens),
            ("handed over", usage.handed_over_tokens),
        ):
            if count:
                self.result.reached.add(f"finished, {what}")

    def _problem(self, what: str) -> None:
        self._trace("problem", what)
        self.result.problems.append(what)

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._problem(f"unhandled: {context.get('exception')!r} {context['message']}")

    def _trace(self, *what: object) -> None:
        line = f"{self._loop.now:.6f} {what!r}"
        self._digest.update(line.encode())
        if self._keep_lines:
            self.result.lines.append(line)

    def _end_tasks(self) -> None:
        loop = self._loop
        for _ in range(5):
            tasks = asyncio.all_tasks(loop)
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.wait(tasks, timeout=1.0))
        loop.run_until_complete(loop.shutdown_asyncgens())
