"""Whom a channel leads to: asked once by all who wait, and nobody's bug if they have left."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from decode_svc import peer as peers
from decode_svc.peer import Peer, WrongPeer
from kvstore.index import WorkerLoad, WorkerRecord
from quire.v1 import page_service_pb2 as pb

BOOT_ID, FINGERPRINT = b"b" * 16, b"f" * 16
WORKER = WorkerRecord(
    boot_id=BOOT_ID.hex(),
    role="prefill",
    endpoint="127.0.0.1:1",
    fingerprint=FINGERPRINT.hex(),
    model="hash",
    load=WorkerLoad(0, 0, 0, 1, 1),
    state="serving",
)
RIGHT = pb.IdentifyResponse(boot_id=BOOT_ID, role="prefill", fingerprint=FINGERPRINT)


class Channel:
    """Connected until ``lose``; answers are what the test puts in."""

    def __init__(self) -> None:
        self.state = grpc.ChannelConnectivity.READY
        self.lost = asyncio.Event()
        self.answers: asyncio.Queue[pb.IdentifyResponse] = asyncio.Queue()
        self.num_asked = 0

    def get_state(self) -> grpc.ChannelConnectivity:
        return self.state

    async def wait_for_state_change(self, state: grpc.ChannelConnectivity) -> None:
        await self.lost.wait()

    def lose(self) -> None:
        """And connect again at once: nobody who looks sees it."""
        self.lost.set()
        self.lost = asyncio.Event()

    async def close(self) -> None: ...


class Stub:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def Identify(self, request: Any, timeout: float) -> pb.IdentifyResponse:
        self._channel.num_asked += 1
        return await self._channel.answers.get()


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(peers.page_service_pb2_grpc, "PageServiceStub", Stub)
    return Channel()


async def test_all_who_wait_ask_once_and_later_ones_do_not_wait(channel: Channel) -> None:
    peer = Peer(WORKER, channel)  # type: ignore[arg-type]
    waiting = [asyncio.create_task(peer.channel(5.0)) for _ in range(5)]
    channel.answers.put_nowait(RIGHT)
    assert await asyncio.gather(*waiting) == [channel] * 5
    await peer.channel(5.0)
    assert channel.num_asked == 1
    await peer.close()


async def test_a_connection_made_again_unseen_is_asked_again(channel: Channel) -> None:
    peer = Peer(WORKER, channel)  # type: ignore[arg-type]
    channel.answers.put_nowait(RIGHT)
    await peer.channel(5.0)
    channel.lose()
    for _ in range(3):
        await asyncio.sleep(0)
    channel.answers.put_nowait(RIGHT)
    await peer.channel(5.0)
    assert channel.num_asked == 2
    await peer.close()


async def test_a_wrong_answer_is_not_remembered_as_a_right_one(channel: Channel) -> None:
    peer = Peer(WORKER, channel)  # type: ignore[arg-type]
    for reason, answer in (
        ("boot_id", pb.IdentifyResponse(boot_id=FINGERPRINT, role="prefill")),
        ("boot_id", pb.IdentifyResponse(boot_id=BOOT_ID, role="decode", fingerprint=FINGERPRINT)),
        ("fingerprint", pb.IdentifyResponse(boot_id=BOOT_ID, role="prefill", fingerprint=BOOT_ID)),
    ):
        channel.answers.put_nowait(answer)
        with pytest.raises(WrongPeer) as told:
            await peer.channel(5.0)
        assert told.value.reason == reason
    channel.answers.put_nowait(RIGHT)
    await peer.channel(5.0)
    assert channel.num_asked == 4
    await peer.close()


async def test_an_answer_that_nobody_waits_for_any_more_is_no_error(channel: Channel) -> None:
    """Found by the simulation: the loop was told of an exception that was never retrieved."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    peer = Peer(WORKER, channel)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError):
        await peer.channel(0.0)
    channel.answers.put_nowait(pb.IdentifyResponse())
    asking = peer._asking
    assert asking is not None
    await asyncio.wait({asking})
    peer._asking = None
    del asking
    await asyncio.sleep(0)
    assert told == []
    await peer.close()
