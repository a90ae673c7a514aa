"""The soak: random requests against random faults, and at its end a table and an account.

``make soak`` runs it for $SOAK_MINUTES (10) from $SOAK_SEED; the tests run it for half a minute. It
fails on a wrong token, a request that did not end by its deadline, an error that no fault explains,
or a page that did not come back.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import redis

from engine.local import AsyncLocalEngine
from engine.remote import AsyncRemoteEngine
from engine.sampling_params import SamplingParams
from tests.faults.fleet import Fleet, WorkerProcess, fleet_of
from tests.faults.history import OK, Prompt, Record, Summary, observe, summary, violations
from tests.faults.truth import Truth

PATIENT_S, HURRIED_S = 30.0, 0.3
NUM_CALLERS = 6
TELL_EVERY_S = 30.0
# What a fault may do to a request. A stream whose decode worker dies goes on at another one.
EXPLAINED = {
    "DeadlineExceeded",
    "ResourceExhausted",
    "ShuttingDown",
    "RequestCancelled",
}
Request = tuple[Prompt, SamplingParams]


def requests_of(rng: random.Random, count: int) -> list[Request]:
    """Prompts of all lengths, many with a common beginning, and all kinds of parameters."""
    stems = [tuple(rng.randrange(250) for _ in range(300)) for _ in range(4)]
    made: list[Request] = []
    for number in range(count):
        stem = rng.choice(stems)[: rng.randrange(300)]
        tail = tuple(rng.randrange(250) for _ in range(rng.randint(1, 60)))
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.8, 1.3]),
            seed=number,
            max_tokens=rng.randint(1, 120),
            n=rng.choice([1, 1, 1, 2]),
            presence_penalty=rng.choice([0.0, 0.7]),
            ignore_eos=rng.random() < 0.5,
        )
        made.append((stem + tail, params))
    return made


class Soak:
    """Callers and a nemesis on one fleet; ``rng`` decides everything that is decided here."""

    def __init__(self, fleet: Fleet, truth: Truth, seed: int) -> None:
        self._fleet = fleet
        self._truth = truth
        self._rng = random.Random(seed)
        self._requests = requests_of(self._rng, 60)
        self.history: list[Record] = []
        self.faults: Counter[str] = Counter()

    async def run(self, seconds: float) -> Summary:
        """Ends with everything healed. Raises AssertionError if anything was not as promised."""
        reference = await self._truth.of(self._requests)
        ends = time.monotonic() + seconds
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(self._fleet.client(timeout_s=limit, tenant=tenant))
                for limit in (PATIENT_S, HURRIED_S)
                for tenant in ("", "other")
            ]
            async with asyncio.TaskGroup() as group:
                for _ in range(NUM_CALLERS):
                    caller = random.Random(self._rng.random())
                    group.create_task(self._call(clients, caller, ends))
                group.create_task(self._break(ends))
                group.create_task(self._tell(ends))
        await self._fleet.whole()
        last = len(self.history)
        await self._all_once()
        found = violations(self.history, reference)
        found += [
            f"request {number}: {record.outcome}, which no fault explains: {record.reason}"
            for number, record in enumerate(self.history)
            if record.outcome not in EXPLAINED | {OK, "cancelled"}
            or (number >= last and record.outcome != OK)
        ]
        result = summary(self.history, found)
        print(f"{self.table(result)}", flush=True)
        assert not found, "\n".join(found[:20])
        await self._fleet.balanced()
        return result

    def table(self, result: Summary) -> str:
        faults = "\n".join(f"| {name} | {count} |" for name, count in sorted(self.faults.items()))
        return f"\n| requests | |\n|---|---|\n{result.table()}\n| faults | |\n{faults}"

    async def _all_once(self) -> None:
        """After the storm every request must end well."""
        async with self._fleet.client(timeout_s=PATIENT_S) as client:
            for prompt, params in self._requests[:20]:
                await observe(client, prompt, params, PATIENT_S, self.history)

    async def _call(
        self, clients: list[AsyncRemoteEngine], rng: random.Random, ends: float
    ) -> None:
        while time.monotonic() < ends:
            prompt, params = rng.choice(self._requests)
            client, limit = rng.choice(clients[:2]), PATIENT_S
            if rng.random() < 0.1:
                client, limit = rng.choice(clients[2:]), HURRIED_S
            stop_after = rng.randrange(20) if rng.random() < 0.25 else None
            record = await observe(client, prompt, params, limit, self.history, stop_after)
            if record.outcome not in (OK, "cancelled"):
                await asyncio.sleep(0.1)  # as a caller with manners does

    async def _tell(self, ends: float) -> None:
        while (left := ends - time.monotonic()) > 0:
            await asyncio.sleep(min(TELL_EVERY_S, left))
            outcomes = Counter(record.outcome for record in self.history)
            print(f"{max(left - TELL_EVERY_S, 0):.0f} s to go: {dict(outcomes)}", flush=True)

    # -- the nemesis

    async def _break(self, ends: float) -> None:
        deeds: list[Callable[[], Awaitable[None]]] = [
            self._freeze,
            self._hold_link,
            self._reset_link,
            self._slow_link,
            self._flip_bytes,
            self._kill_redis,
            self._freeze_redis,
            self._flush_redis,
        ]
        while time.monotonic() < ends:
            await asyncio.sleep(self._rng.uniform(0.3, 2.0))
            self._kill()
            deed = self._rng.choice(deeds)
            await deed()
            self.faults[deed.__name__.strip("_").replace("_", " ")] += 1

    def _any_worker(self) -> WorkerProcess:
        return self._rng.choice([worker for worker in self._fleet.workers if worker.alive])

    def _kill(self) -> None:
        """One at a time is on its way back; meanwhile other things go wrong."""
        if all(worker.serving for worker in self._fleet.workers):
            worker = self._any_worker()
            worker.kill()
            worker.start()
            self.faults["kill"] += 1

    async def _freeze(self) -> None:
        worker = self._any_worker()
        worker.freeze()
        await asyncio.sleep(self._rng.uniform(0.1, 4.5))
        worker.thaw()

    async def _hold_link(self) -> None:
        link = self._any_worker().link
        link.hold()
        await asyncio.sleep(self._rng.uniform(0.1, 4.5))
        await link.heal()

    async def _reset_link(self) -> None:
        link = self._any_worker().link
        await link.refuse()
        await asyncio.sleep(self._rng.uniform(0.0, 0.5))
        await link.heal()

    async def _slow_link(self) -> None:
        link = self._any_worker().link
        link.to_client.delay_s = link.to_client.jitter_s = 0.1
        await asyncio.sleep(2)
        await link.heal()

    async def _flip_bytes(self) -> None:
        """Towards decode only: what a client gets is not digested, that is TLS's task."""
        link = self._rng.choice(self._fleet.prefill).link
        for _ in range(5):
            link.to_client.flip_at = self._rng.randrange(20_000)
            await asyncio.sleep(0.2)
        await link.heal()

    async def _kill_redis(self) -> None:
        os.kill(self._fleet.server.pid, signal.SIGKILL)
        await asyncio.sleep(self._rng.uniform(0.0, 2.0))
        self._fleet.server.stop()
        self._fleet.server.start()

    async def _freeze_redis(self) -> None:
        os.kill(self._fleet.server.pid, signal.SIGSTOP)
        await asyncio.sleep(self._rng.uniform(0.1, 3.0))
        os.kill(self._fleet.server.pid, signal.SIGCONT)

    async def _flush_redis(self) -> None:
        with redis.Redis.from_url(self._fleet.server.url) as client:
            await asyncio.to_thread(client.flushall)


async def main() -> int:
    minutes = float(os.environ.get("SOAK_MINUTES", "10"))
    seed = int(os.environ.get("SOAK_SEED", "1"))
    print(f"soak: {minutes:g} minutes, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        async with (
            fleet_of(Path(folder), num_prefill=2, num_decode=2, real=True) as fleet,
            AsyncLocalEngine("hash", page_size=16) as engine,
        ):
            await Soak(fleet, Truth(engine), seed).run(minutes * 60)
    print("every page is back on every worker", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
