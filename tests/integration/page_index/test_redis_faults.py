"""A server that dies, hangs, forgets, talks rubbish, or whose replies get lost."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis

from kvstore.embedded import EmbeddedRedis
from kvstore.index import (
    HandoverRecord,
    HandoverState,
    IdentityConflict,
    IndexUnavailable,
    StaleTransition,
)
from kvstore.index.redis import RedisPageIndex

A, B = "a1" * 16, "b2" * 16
MODEL = "f0" * 16
REQUEST = "c3" * 16
PAGES = [bytes([number]) * 16 for number in range(1, 6)]
LONG_S = 600.0
OFFER = HandoverRecord(REQUEST, 1, HandoverState.OFFERED, A, B, 7, 30.0)
TIMEOUT_S = 1.0


@asynccontextmanager
async def index_at(
    url: str, timeout_s: float = TIMEOUT_S, cooldown_s: float = 60.0
) -> AsyncIterator[RedisPageIndex]:
    index = RedisPageIndex(url, "quire", timeout_s, cooldown_s)
    try:
        yield index
    finally:
        await index.close()


async def seconds_to_fail(call: Awaitable[object]) -> float:
    start = time.monotonic()
    with pytest.raises(IndexUnavailable):
        await call
    return time.monotonic() - start


async def works(call: Awaitable[object]) -> bool:
    try:
        await call
    except IndexUnavailable:
        return False
    return True


async def test_killed_server_fails_fast_and_a_heartbeat_repopulates_the_next_one(
    own_server, worker, assert_eventually
):
    async with index_at(own_server.url, timeout_s=5.0, cooldown_s=0.05) as index:
        await index.register(worker(), LONG_S)
        os.kill(own_server.pid, signal.SIGKILL)
        await assert_eventually(lambda: not own_server.alive)
        for call in (index.workers(), index.lookup(MODEL, PAGES), index.handover(REQUEST)):
            assert await seconds_to_fail(call) < 2.5  # refused, not waited for

        url = own_server.url
        own_server.start()
        assert own_server.url == url
        await assert_eventually(lambda: works(index.register(worker(), LONG_S)))
        assert await index.workers() == [worker()]


async def test_server_that_never_was_there_fails_fast():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"redis://127.0.0.1:{taken.getsockname()[1]}"
        async with index_at(url, timeout_s=5.0) as index:
            assert await seconds_to_fail(index.workers()) < 2.5  # refused, not waited for


async def test_paused_server_costs_one_timeout_and_then_nothing(own_server, worker):
    async with index_at(own_server.url) as index:
        await index.register(worker(), LONG_S)
        os.kill(own_server.pid, signal.SIGSTOP)
        try:
            assert TIMEOUT_S * 0.9 <= await seconds_to_fail(index.workers()) < 2 * TIMEOUT_S
            start = time.monotonic()
            for _ in range(100):
                await seconds_to_fail(index.workers())
            assert time.monotonic() - start < 10 * TIMEOUT_S  # and not a hundred
        finally:
            os.kill(own_server.pid, signal.SIGCONT)


async def test_paused_server_is_used_again_when_it_goes_on(own_server, worker, assert_eventually):
    async with index_at(own_server.url, cooldown_s=0.05) as index:
        await index.register(worker(), LONG_S)
        os.kill(own_server.pid, signal.SIGSTOP)
        try:
            await seconds_to_fail(index.workers())
        finally:
            os.kill(own_server.pid, signal.SIGCONT)

        async def listed():
            try:
                return await index.workers() == [worker()]
            except IndexUnavailable:
                return False

        await assert_eventually(listed)


async def test_connection_that_the_event_loop_has_closed_is_an_unavailable_index(
    own_server, worker, monkeypatch
):
    """uvloop says RuntimeError, which nobody looks for, of a write to a connection just reset."""

    def closed(*_: object) -> None:
        raise RuntimeError("unable to perform operation; the handler is closed")

    async with index_at(own_server.url, timeout_s=5.0, cooldown_s=0.0) as index:
        await index.register(worker(), LONG_S)
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.StreamWriter, "writelines", closed)
            with pytest.raises(IndexUnavailable):
                await index.workers()
        assert await index.workers() == [worker()]


async def test_flushed_server_is_filled_again_by_the_next_heartbeat(own_server, worker):
    async with index_at(own_server.url, timeout_s=5.0) as index:
        await index.register(worker(), LONG_S)
        await index.offer_handover(OFFER, LONG_S)
        with redis.Redis.from_url(own_server.url, protocol=2) as raw:
            raw.flushall()
        assert await index.workers() == []
        with pytest.raises(StaleTransition):
            await index.move_handover(REQUEST, 1, HandoverState.LANDED)
        await index.register(worker(), LONG_S)
        assert await index.workers() == [worker()]


async def test_full_server_refuses_writes_and_goes_on_reading(own_server, worker):
    async with index_at(own_server.url, timeout_s=5.0) as index:
        await index.register(worker(), LONG_S)
        with redis.Redis.from_url(own_server.url, protocol=2) as raw:
            raw.config_set("maxmemory-policy", "noeviction")
            raw.config_set("maxmemory", 1)
        with pytest.raises(IndexUnavailable, match="maxmemory"):
            await index.publish(MODEL, PAGES, A, LONG_S)
        assert await index.workers() == [worker()]
        assert await index.lookup(MODEL, PAGES) == []


# Servers that are not what they should be


@asynccontextmanager
async def peer(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """A listener that treats each connection as ``talk`` does; yields its URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"-LOADING the data set\r\n",
        b"-READONLY a replica\r\n",
        b"-NOAUTH Authentication required.\r\n",
        b"-MOVED 1 10.0.0.1:6379\r\n",
        b"-ERR " + b"x" * 10_000_000 + b"\r\n",
        b"$-5\r\n",
        b"*" + b"9" * 30 + b"\r\n",
        b"\x00" * 64,
        b"",
    ],
    ids=lambda reply: repr(reply[:12]),
)
async def test_reply_of_another_kind_is_an_unavailable_index(reply, worker):
    async def rubbish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(reply)
        await writer.drain()

    async with peer(rubbish) as url, index_at(url, timeout_s=2.0, cooldown_s=0.0) as index:
        for call in (index.register(worker(), LONG_S), index.workers(), index.lookup(MODEL, PAGES)):
            with pytest.raises(IndexUnavailable):
                await call


@pytest.mark.parametrize("reply", [b":5\r\n", b"+OK\r\n", b"*2\r\n:0\r\n:1\r\n"])
async def test_reply_of_another_shape_is_an_unavailable_index(reply):
    async def wrong(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            writer.write(reply)
            await writer.drain()

    async with peer(wrong) as url, index_at(url, timeout_s=2.0, cooldown_s=0.0) as index:
        for call in (index.workers(), index.lookup(MODEL, PAGES), index.handover(REQUEST)):
            with pytest.raises(IndexUnavailable):
                await call


@asynccontextmanager
async def losing_replies(server_url: str) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A proxy that passes commands on and cuts the connection instead of the reply to the next
    script, once for every name put in the list."""
    port = int(server_url.rsplit(":", 1)[1].split("/")[0])
    to_lose: list[bytes] = []

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", port)
        try:
            while command := await reader.read(65536):
                upstream.write(command)
                reply = await upstream_reader.read(65536)
                if to_lose and not reply.startswith(b"-NOSCRIPT") and b"EVALSHA" in command:
                    to_lose.pop()
                    return
                writer.write(reply)
                await writer.drain()
        finally:
            upstream.close()

    async with peer(relay) as url:
        yield url, to_lose


async def test_change_whose_reply_was_lost_can_be_repeated(own_server, worker):
    async with (
        losing_replies(own_server.url) as (url, to_lose),
        index_at(url, timeout_s=5.0, cooldown_s=0.0) as index,
    ):

        async def lost_then_repeated(call: Callable[[], Awaitable[None]]) -> None:
            to_lose.append(b"reply")
            with pytest.raises(IndexUnavailable):
                await call()
            assert not to_lose
            await call()

        await lost_then_repeated(lambda: index.register(worker(), LONG_S))
        with pytest.raises(IdentityConflict):
            await index.register(worker(endpoint="other:1"), LONG_S)
        assert await index.workers() == [worker()]

        await lost_then_repeated(lambda: index.publish(MODEL, PAGES, A, LONG_S))
        assert await index.lookup(MODEL, PAGES) == [frozenset([A])] * 5
        await lost_then_repeated(lambda: index.withdraw(MODEL, PAGES[2:], A))
        assert await index.lookup(MODEL, PAGES) == [frozenset([A])] * 2

        await lost_then_repeated(lambda: index.offer_handover(OFFER, LONG_S))
        landed = HandoverState.LANDED
        await lost_then_repeated(lambda: index.move_handover(REQUEST, 1, landed))
        assert (await index.handover(REQUEST)).state is landed


async def test_cancelled_call_leaves_no_reply_for_the_next_one(own_server, worker):
    async with index_at(own_server.url, timeout_s=5.0) as index:
        await index.register(worker(), LONG_S)
        await index.publish(MODEL, PAGES, B, LONG_S)
        for _ in range(50):
            call = asyncio.create_task(index.lookup(MODEL, PAGES))
            await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            assert await index.workers() == [worker()]


# Redis cluster


async def test_cluster_accepts_every_script(tmp_path: Path, worker, assert_eventually):
    options = {"cluster-enabled": "yes", "cluster-require-full-coverage": "no"}
    with (
        socket.socket() as bus,
        EmbeddedRedis(tmp_path, options=options | {"cluster-port": str(free_port(bus))}) as server,
        redis.Redis.from_url(server.url, protocol=2) as raw,
    ):
        raw.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        await assert_eventually(lambda: raw.cluster("INFO")["cluster_state"] == "ok")
        with pytest.raises(redis.ResponseError, match="same slot"):
            raw.mget("one", "other")
        async with index_at(server.url, timeout_s=5.0) as index:
            await index.register(worker(), LONG_S)
            assert await index.workers() == [worker()]
            await index.publish(MODEL, PAGES, A, LONG_S)
            assert len(await index.lookup(MODEL, PAGES)) == 5
            await index.withdraw(MODEL, PAGES, A)
            assert await index.lookup(MODEL, PAGES) == []
            await index.offer_handover(OFFER, LONG_S)
            await index.move_handover(REQUEST, 1, HandoverState.LANDED)
            assert (await index.handover(REQUEST)).state is HandoverState.LANDED
            await index.unregister(A)


def free_port(probe: socket.socket) -> int:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
    probe.close()
    return port
