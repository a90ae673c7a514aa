"""Fixtures of the fault tests: one fleet of processes for all of them, whole before each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import redis

from engine.local import AsyncLocalEngine
from kvstore.embedded import EmbeddedRedis
from tests.faults.fleet import Fleet, fleet_of
from tests.faults.truth import Truth


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def truth() -> AsyncIterator[Truth]:
    async with AsyncLocalEngine("hash", page_size=16) as engine:
        yield Truth(engine)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def _processes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    folder: Path = tmp_path_factory.mktemp("fleet")
    async with fleet_of(folder, num_prefill=2, num_decode=2) as fleet:
        yield fleet


@pytest_asyncio.fixture(loop_scope="session")
async def fleet(_processes: Fleet) -> AsyncIterator[Fleet]:
    """Two prefill and two decode processes; afterwards every page must be back."""
    await _processes.whole()
    yield _processes
    for worker in _processes.workers:
        worker.disarm()
    await _processes.balanced()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> str:
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url
