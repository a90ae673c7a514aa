"""A prefill and a decode service in this process: real servers, real sockets, a real Redis."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from decode_svc.__main__ import DecodeWorker
from decode_svc.config import DecodeSettings
from engine.core import EngineCore
from engine.model import Model, ModelSpec
from engine.model.load import LoadedModel, load_model
from engine.remote import AsyncRemoteEngine
from engine.serving import options
from engine.serving import server as serving
from engine.serving import worker as worker_module
from engine.serving.worker import Worker
from kernels.layout import PageLayout
from kernels.ragged import RaggedBatch, Said
from kvstore.index.redis import RedisPageIndex
from kvstore.ledger import PageState
from prefill_svc.__main__ import PrefillWorker
from prefill_svc.config import PrefillSettings

# Long enough that a stall of this machine is not taken for an answer that failed to come: what a
# service had to tell Redis would then be lost.
INDEX_TIMEOUT_S = 5.0


class GatedModel:
    """A model whose steps wait for a gate; open unless a test closes it."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.gate = threading.Event()
        self.gate.set()
        self.num_steps = 0
        self.fail_on: int | None = None

    @property
    def spec(self) -> ModelSpec:
        return self._model.spec

    def forward(self, batch: RaggedBatch, kv: torch.Tensor, layout: PageLayout) -> Said:
        self.num_steps += 1
        assert self.gate.wait(60), "a test forgot to open the gate"
        if self.fail_on is not None and bool((batch.token_ids == self.fail_on).any()):
            raise RuntimeError("a model that fails on one token")
        return self._model.forward(batch, kv, layout)


@dataclass
class Node:
    """One running service."""

    worker: Worker
    endpoint: str
    model: GatedModel
    stop: asyncio.Event
    task: asyncio.Task[None]

    @property
    def core(self) -> EngineCore:
        return self.worker.engine.core

    def client(self, **options: Any) -> AsyncRemoteEngine:
        return AsyncRemoteEngine([self.endpoint], **options)

    async def in_balance(self) -> bool:
        """Whether every page is free or idle in the cache, and the ledger agrees with itself."""

        def check(core: EngineCore) -> bool:
            core.pool.check()
            free = core.pool.ledger.count(PageState.FREE)
            return (
                core.scheduler.num_sequences == 0
                and free + core.pool.num_idle == core.pool.num_pages
            )

        return await self.worker.engine.call(check)

    def holdings(self) -> list[str]:
        """Sequences and pages that are still held, in words."""
        ledger = self.core.pool.ledger
        pages = [ledger[slot] for slot in range(len(ledger)) if ledger[slot].held]
        sequences = list(self.core.scheduler._sequences)
        return [*sequences, *[f"page {page.slot}: {page.reason}" for page in pages]]

    async def close(self) -> None:
        self.model.gate.set()
        self.stop.set()
        await self.task


@dataclass
class Cluster:
    prefill: list[Node] = field(default_factory=list)
    decode: list[Node] = field(default_factory=list)

    @property
    def nodes(self) -> list[Node]:
        return [*self.prefill, *self.decode]

    def client(self, **options: Any) -> AsyncRemoteEngine:
        return AsyncRemoteEngine([node.endpoint for node in self.decode], **options)

    async def balanced(self) -> None:
        """Waits until all pages came back everywhere; fails if they do not."""
        for node in self.nodes:
            try:
                await eventually(node.in_balance)
            except TimeoutError:
                raise AssertionError(f"{node.worker.name}: {node.holdings()}") from None

    async def prefill_known(self) -> None:
        """Waits until the decode services know a prefill worker."""
        for node in self.decode:
            workers = node.worker._workers  # type: ignore[attr-defined]
            await until(lambda workers=workers: workers.choose() is not None)


def keep_silent_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stall of this machine, or bytes that take their time, do not pass for a lost peer."""

    # gRPC also pings of its own accord, to measure bandwidth: that has a time-out as well.
    impatient = ("grpc.keepalive_time_ms", "grpc.http2.ping_timeout_ms")

    def without_pings(given: options.Options) -> options.Options:
        return tuple((name, value) for name, value in given if name not in impatient)

    monkeypatch.setattr(options, "_CHANNEL", without_pings(options._CHANNEL))
    monkeypatch.setattr(serving, "SERVER_OPTIONS", without_pings(serving.SERVER_OPTIONS))


async def eventually(check: Callable[[], Awaitable[bool]], timeout_s: float = 20.0) -> None:
    """Waits until ``await check()`` is true."""
    async with asyncio.timeout(timeout_s):
        while not await check():  # noqa: ASYNC110 - what is waited for has no event to offer
            await asyncio.sleep(0.01)


async def until(condition: Callable[[], bool]) -> None:
    """Waits until the condition is true."""

    async def check() -> bool:
        return condition()

    await eventually(check)


def settings_for(redis_url: str, **changes: Any) -> dict[str, Any]:
    common: dict[str, Any] = {
        "redis": redis_url,
        "model": "hash",
        "page_size": 16,
        "pool_tokens": 4096,
        "min_remote_tokens": 16,
        "check_pages": True,
        "drain_s": 5.0,
    }
    return common | changes


def decode_settings(redis_url: str, **changes: Any) -> DecodeSettings:
    """Prompts go to a prefill worker wherever possible: which way is fastest here is no matter."""
    return DecodeSettings(**({"prefill": "remote"} | settings_for(redis_url, **changes)))


@asynccontextmanager
async def running(
    redis_url: str,
    *,
    num_prefill: int = 1,
    num_decode: int = 1,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    loaded: LoadedModel | None = None,
    **common: Any,
) -> AsyncIterator[Cluster]:
    """Services of the hash model (or ``loaded``), stopped and checked for balance at the end."""
    cluster = Cluster()
    try:
        for _ in range(num_prefill):
            settings = PrefillSettings(**settings_for(redis_url, **common, **(prefill or {})))
            cluster.prefill.append(await start(PrefillWorker, settings, loaded))
        for _ in range(num_decode):
            settings_d = decode_settings(redis_url, **common, **(decode or {}))
            cluster.decode.append(await start(DecodeWorker, settings_d, loaded))
        if num_prefill:
            await cluster.prefill_known()
        yield cluster
        await cluster.balanced()
    finally:
        for node in reversed(cluster.nodes):
            await node.close()


async def start(role: Any, settings: Any, loaded: LoadedModel | None = None) -> Node:
    """Starts one service in this loop and waits until it serves."""
    stop = asyncio.Event()
    kv = None if settings.kv == "auto" else settings.kv
    base = loaded or load_model(settings.model, weights=settings.weights, kv=kv)
    gated = GatedModel(base.model)
    worker = role(settings, stop.set)
    worker.index = RedisPageIndex(settings.redis, timeout_s=INDEX_TIMEOUT_S)
    endpoint: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    warm = worker.warm

    async def warm_and_tell(where: str) -> None:
        original = worker_module.load_model
        worker_module.load_model = lambda *_, **__: replace(base, model=gated)  # type: ignore[assignment]
        try:
            await warm(where)
        finally:
            worker_module.load_model = original
        endpoint.set_result(where)

    worker.warm = warm_and_tell
    task = asyncio.create_task(serving.serve(worker, settings.listen, stop))
    await asyncio.wait({task, endpoint}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    return Node(worker, await endpoint, gated, stop, task)
