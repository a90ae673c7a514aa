"""A TCP proxy of the tests: it breaks what passes through it, as told.

::

    client --> Link.endpoint --> to_server --> target
           <--               <-- to_client <--

Both directions are ``Flow`` objects whose fields may be changed while bytes pass. Whatever was done
to a link, ``heal`` undoes.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

READ_BYTES = 65536
QUEUED_READS = 64
PORTS = (20_000, 32_000)
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of no time: close() sends RST


def free_port() -> int:
    """A port that is free, and that the system gives to no connection of its own accord: whoever
    keeps trying to reach a closed port of that kind ends up connected to itself."""
    while True:
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


class Cut(Exception):
    """The connection ends here, without a word."""


@dataclass
class Flow:
    """One direction of a link.

    ``cut_after`` and ``flip_at`` count bytes from when they are set, over all connections;
    ``held`` bytes wait, as they would in a network that came back.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float | None = None
    slice_bytes: int = READ_BYTES
    cut_after: int | None = None
    flip_at: int | None = None
    record: bytearray | None = None
    num_bytes: int = 0
    random: random.Random = field(default_factory=lambda: random.Random(0))
    _open: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._open.set()

    @property
    def held(self) -> bool:
        return not self._open.is_set()

    def hold(self) -> None:
        self._open.clear()

    def heal(self) -> None:
        self.delay_s = self.jitter_s = 0.0
        self.bytes_per_s = self.cut_after = self.flip_at = self.record = None
        self.slice_bytes = READ_BYTES
        self._open.set()

    def arrival(self, after: float) -> float:
        """When bytes read now are due, in loop time; never before what came earlier."""
        now = asyncio.get_running_loop().time()
        return max(after, now + self.delay_s + self.jitter_s * self.random.uniform(-1, 1))

    async def write(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        """Passes bytes on as the flow stands. Raises Cut."""
        size = self.slice_bytes
        for start in range(0, len(data), size):
            await self._open.wait()
            piece, last = self._changed(data[start : start + size])
            writer.write(piece)
            await writer.drain()
            self.num_bytes += len(piece)
            if self.record is not None:
                self.record += piece
            if last:
                raise Cut
            if self.bytes_per_s is not None:
                await asyncio.sleep(len(piece) / self.bytes_per_s)

    def _changed(self, piece: bytes) -> tuple[bytes, bool]:
        """The bytes that may pass, and whether they are the last ones."""
        if self.flip_at is not None:
            if self.flip_at < len(piece):
                flipped = bytearray(piece)
                flipped[self.flip_at] ^= 1
                piece, self.flip_at = bytes(flipped), None
            else:
                self.flip_at -= len(piece)
        if self.cut_after is None:
            return piece, False
        piece = piece[: self.cut_after]
        self.cut_after -= len(piece)
        if self.cut_after:
            return piece, False
        self.cut_after = None
        return piece, True


class Link:
    """Listens on a port of its own; ``target`` may be changed and counts for new connections."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = free_port()
        self.to_server = Flow()
        self.to_client = Flow()
        self.num_connections = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @classmethod
    async def to(cls, target: int) -> Self:
        """A link to a port of this machine."""
        link = cls(target)
        await link.listen()
        return link

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def refuse(self) -> None:
        """Every connection is reset, new ones are refused."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self.reset()

    async def reset(self) -> None:
        """Every connection ends with RST; new ones are served."""
        for task in tuple(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def hold(self) -> None:
        """A black hole: connections stand and are accepted, no byte arrives."""
        self.to_server.hold()
        self.to_client.hold()

    async def heal(self) -> None:
        self.to_server.heal()
        self.to_client.heal()
        await self.listen()

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.refuse()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        writers = [writer]
        try:
            upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self.target)
            writers.append(upstream)
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(reader, upstream, self.to_server))
                both.create_task(_pump(upstream_reader, writer, self.to_client))
        except* (OSError, Cut):
            pass
        finally:
            for each in writers:
                _reset(each)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flow: Flow) -> None:
    """Bytes keep coming in while earlier ones are on their way: a delay costs no bandwidth."""
    _without_delay(writer)
    on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_READS)

    async def take_in() -> None:
        due = 0.0
        while True:
            data = await reader.read(READ_BYTES)
            due = flow.arrival(due)
            await on_the_way.put((due, data))
            if not data:
                return

    async with asyncio.TaskGroup() as group:
        group.create_task(take_in())
        while True:
            due, data = await on_the_way.get()
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            if not data:
                break
            await flow.write(data, writer)
        with suppress(OSError):
            writer.write_eof()


def _without_delay(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _reset(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        handle = writer.get_extra_info("socket")
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
    writer.transport.abort()
