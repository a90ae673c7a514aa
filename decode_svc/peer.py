"""A worker as this service reaches it: a channel whose other end has said who it is.

The index may name any address (law 6), so on every new connection the other end is asked first;
nothing of a prompt goes to one that does not answer as the index said. A peer that lies about its
identity is not found out by this: only a certificate would.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import grpc

from kvstore.index import WorkerRecord
from quire.v1 import page_service_pb2 as pb
from quire.v1 import page_service_pb2_grpc

IDENTIFY_TIMEOUT_S = 5.0
_READY = grpc.ChannelConnectivity.READY


class WrongPeer(Exception):
    """The endpoint answered as somebody else; ``reason`` is "boot_id" or "fingerprint"."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class Peer:
    """One worker's channel, which the peer closes. One event loop uses it."""

    def __init__(self, worker: WorkerRecord, channel: grpc.aio.Channel) -> None:
        self._worker = worker
        self._channel = channel
        self._identified = False
        self._asking: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    async def channel(self, timeout_s: float) -> grpc.aio.Channel:
        """The channel, connected to the worker meant; no round trip while a connection lasts.

        Raises WrongPeer, TimeoutError, gRPC's errors, and CancelledError if the peer is closed.
        """
        if not self._identified or self._channel.get_state() is not _READY:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.ensure_future(self._identify())
                self._asking.add_done_callback(_noted)
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self._asking)  # others wait for the same answer
        return self._channel

    async def close(self) -> None:
        for task in (self._asking, self._watching):
            if task is not None:
                task.cancel()
        await self._channel.close()

    async def _identify(self) -> None:
        self._identified = False
        if self._watching is not None:
            self._watching.cancel()
        stub = page_service_pb2_grpc.PageServiceStub(self._channel)
        self._check(await stub.Identify(pb.IdentifyRequest(), timeout=IDENTIFY_TIMEOUT_S))
        self._identified = True
        self._watching = asyncio.ensure_future(self._forget_when_lost())

    def _check(self, answer: pb.IdentifyResponse) -> None:
        worker = self._worker
        if (answer.boot_id.hex(), answer.role) != (worker.boot_id, worker.role):
            raise WrongPeer("boot_id", f"{answer.role} {answer.boot_id.hex()} answered")
        if answer.fingerprint.hex() != worker.fingerprint:
            raise WrongPeer("fingerprint", f"it has {answer.fingerprint.hex()}")

    async def _forget_when_lost(self) -> None:
        """A connection made again, even within one turn of the loop, is another one."""
        with suppress(grpc.aio.UsageError):  # the channel was closed
            await self._channel.wait_for_state_change(_READY)
        self._identified = False


def _noted(asking: asyncio.Task[None]) -> None:
    """An answer is nobody's bug if all who waited for it have left."""
    if not asking.cancelled():
        asking.exception()
