"""Each test has its own prefix on the one server of all tests, or a server of its own."""

from __future__ import annotations

import asyncio
import inspect
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from kvstore.embedded import EmbeddedRedis
from kvstore.index import PageIndex, WorkerLoad, WorkerRecord
from kvstore.index.memory import MemoryPageIndex
from kvstore.index.redis import RedisPageIndex

PATIENCE_S = 20.0
POLL_S = 0.01
# Long enough that a stall of this machine is not taken for an answer that failed to come.
CALL_TIMEOUT_S = 5.0


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A server that the test may kill, stop or flush."""
    with EmbeddedRedis(tmp_path) as server:
        yield server


@pytest.fixture
def prefix() -> str:
    return f"test-{secrets.token_hex(8)}"


@pytest.fixture
def raw(redis_server: EmbeddedRedis) -> Iterator[redis.Redis]:
    """Sees and spoils what the index stores."""
    with redis.Redis.from_url(redis_server.url, protocol=2) as client:
        yield client


@pytest.fixture
async def redis_index(redis_server: EmbeddedRedis, prefix: str) -> AsyncIterator[RedisPageIndex]:
    index = RedisPageIndex(redis_server.url, prefix, CALL_TIMEOUT_S)
    yield index
    await index.close()


@pytest.fixture
def assert_eventually() -> Callable[..., Awaitable[None]]:
    """``await assert_eventually(condition)``; the condition may be a coroutine function."""

    async def wait(condition: Callable[[], Any]) -> None:
        give_up = time.monotonic() + PATIENCE_S
        while True:
            held = condition()
            if await held if inspect.isawaitable(held) else held:
                return
            assert time.monotonic() < give_up, f"not so after {PATIENCE_S} s"
            await asyncio.sleep(POLL_S)

    return wait


class Subject:
    """A page index under test, and how its time passes."""

    # A time to live that the test sees end, though not before it has looked at what lives.
    short_s = 2.0

    def __init__(self, index: PageIndex, pass_time: Callable[[Callable[[], Any]], Any]) -> None:
        self.index = index
        self.eventually = pass_time


@pytest.fixture(params=["memory", "redis"])
async def subject(
    request: pytest.FixtureRequest,
    redis_server: EmbeddedRedis,
    prefix: str,
    assert_eventually: Callable[..., Awaitable[None]],
) -> AsyncIterator[Subject]:
    if request.param == "redis":
        index = RedisPageIndex(redis_server.url, prefix, CALL_TIMEOUT_S)
        yield Subject(index, assert_eventually)
        await index.close()
        return

    now = 100.0

    async def pass_time(condition: Callable[[], Awaitable[bool]]) -> None:
        nonlocal now
        now += Subject.short_s
        assert await condition()

    yield Subject(MemoryPageIndex(lambda: now), pass_time)


@pytest.fixture
def worker() -> Callable[..., WorkerRecord]:
    """A worker's record; every field may be given. Each identity has an endpoint of its own."""

    def make(boot_id: str = "a1" * 16, **given: Any) -> WorkerRecord:
        defaults = {
            "boot_id": boot_id,
            "role": "prefill",
            "endpoint": f"host-{boot_id}:50051",
            "fingerprint": "f0" * 16,
            "model": "smollm2",
            "load": WorkerLoad(1, 2, 300, 40, 50),
            "state": "serving",
        }
        return WorkerRecord(**(defaults | given))

    return make
