"""The proxy of the fault tests does to bytes what it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.faults.link import Link

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def echo_behind_a_link() -> AsyncIterator[Link]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with await Link.to(server.sockets[0].getsockname()[1]) as link:
        yield link
    server.close()


async def open_to(link: Link) -> Streams:
    return await asyncio.open_connection("127.0.0.1", link.port)


async def exchange(streams: Streams, data: bytes) -> bytes:
    reader, writer = streams
    writer.write(data)
    return await reader.readexactly(len(data))


async def test_bytes_pass_unchanged_and_are_recorded() -> None:
    async with echo_behind_a_link() as link:
        link.to_client.record = bytearray()
        streams = await open_to(link)
        data = bytes(range(256)) * 1000
        assert await exchange(streams, data) == data
        assert link.to_client.record == data
        assert link.to_client.num_bytes == len(data)
        streams[1].close()


@pytest.mark.parametrize("after", [1, 2, 99, 100])
async def test_a_cut_lets_exactly_so_many_bytes_pass_and_resets(after: int) -> None:
    async with echo_behind_a_link() as link:
        reader, writer = await open_to(link)
        link.to_client.cut_after = after
        writer.write(bytes(100))
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)) as caught:
            await reader.readexactly(101)
        if isinstance(caught.value, asyncio.IncompleteReadError):
            assert len(caught.value.partial) <= after
        writer.close()
        second = await open_to(link)
        assert await exchange(second, b"again") == b"again"
        second[1].close()


async def test_one_bit_of_one_byte_is_flipped_once() -> None:
    async with echo_behind_a_link() as link:
        streams = await open_to(link)
        link.to_server.flip_at = 5
        link.to_server.slice_bytes = 3
        assert await exchange(streams, bytes(10)) == bytes(5) + b"\x01" + bytes(4)
        assert await exchange(streams, bytes(10)) == bytes(10)
        streams[1].close()


async def test_a_held_link_is_silent_until_it_is_healed() -> None:
    async with echo_behind_a_link() as link:
        streams = await open_to(link)
        link.hold()
        waiting = asyncio.create_task(exchange(streams, b"hello"))
        done, _ = await asyncio.wait({waiting}, timeout=0.2)
        assert not done
        await link.heal()
        assert await waiting == b"hello"
        streams[1].close()


async def test_a_refusing_link_refuses_and_serves_again_on_its_port() -> None:
    async with echo_behind_a_link() as link:
        reader, writer = await open_to(link)
        assert await exchange((reader, writer), b"x") == b"x"
        await link.refuse()
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await open_to(link)
        await link.heal()
        streams = await open_to(link)
        assert await exchange(streams, b"y") == b"y"
        streams[1].close()


async def test_latency_and_slices_change_no_byte_nor_their_order() -> None:
    async with echo_behind_a_link() as link:
        link.to_server.delay_s, link.to_server.jitter_s = 0.03, 0.03
        link.to_client.slice_bytes = 7
        streams = await open_to(link)
        loop = asyncio.get_running_loop()
        began = loop.time()
        for number in range(5):
            data = bytes([number]) * 1000
            assert await exchange(streams, data) == data
        assert loop.time() - began > 0.03
        streams[1].close()
