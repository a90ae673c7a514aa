"""Who is at an address that the index names: asked on every new connection, before any prompt.

The index may name an impostor's address, one that another worker has taken over, or one where
nobody answers. What arrives there is recorded, and must not hold a token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest

from engine.sampling_params import SamplingParams
from engine.serving.pages import PageServicer
from kvstore.index import WorkerLoad, WorkerRecord
from quire.v1 import page_service_pb2 as pb
from tests.faults.link import Link
from tests.integration.cluster import Cluster, Node, eventually, running, until
from tests.integration.reuse import LONG, PARAMS, answer, counted, expected_tokens, page_names

IDENTIFY = "/quire.v1.PageService/Identify"
OTHER = b"\xab" * 16


class Impostor(grpc.GenericRpcHandler):
    """A server that answers ``Identify`` as told (None: not at all) and records what it is sent."""

    def __init__(self, answer: pb.IdentifyResponse | None) -> None:
        self._answer = answer
        self.received: list[tuple[str, bytes]] = []
        self.endpoint = ""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method

        async def handle(request: bytes, context: Any) -> bytes:
            self.received.append((method, request))
            if method != IDENTIFY:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "not me")
            if self._answer is None:
                await asyncio.Event().wait()
            return self._answer.SerializeToString()

        return grpc.unary_unary_rpc_method_handler(handle)


@asynccontextmanager
async def listening(impostor: Impostor) -> AsyncIterator[Impostor]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((impostor,))
    impostor.endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield impostor
    finally:
        await server.stop(None)


async def named(decode: Node, impostor: Impostor, role: str) -> WorkerRecord:
    """The index says that an idle worker is there, and that it holds every page of LONG."""
    record = replace(
        await decode.worker._record(impostor.endpoint),
        boot_id="00" * 16,
        role=role,
        state="serving",
        load=WorkerLoad(0, 0, 0, 9999, 9999),
    )
    index, fingerprint = decode.worker.index, decode.core.fingerprint.digest.hex()
    await index.register(record, 60.0)
    await index.publish(fingerprint, page_names(decode), record.boot_id, 60.0)
    await decode.worker._workers.refresh()  # type: ignore[attr-defined]
    return record


def wrong_answers(decode: Node) -> dict[str, pb.IdentifyResponse | None]:
    mine = decode.core.fingerprint.digest
    return {
        "boot_id": pb.IdentifyResponse(boot_id=OTHER, role="prefill", fingerprint=mine),
        "fingerprint": pb.IdentifyResponse(boot_id=bytes(16), role="prefill", fingerprint=OTHER),
        "silent": None,
    }


@pytest.mark.parametrize("reason", ["boot_id", "fingerprint", "silent"])
async def test_no_prompt_goes_to_who_does_not_answer_as_the_index_said(
    redis_url: str, reason: str
) -> None:
    options = {"handover_idle_s": 1.0} if reason == "silent" else {}
    async with running(redis_url, decode=options) as cluster:
        (decode,) = cluster.decode
        async with listening(Impostor(wrong_answers(decode)[reason])) as impostor:
            await named(decode, impostor, "prefill")
            assert await answer(decode) == await expected_tokens()
            assert {method for method, _ in impostor.received} == {IDENTIFY}
            assert not any(request for _, request in impostor.received)
        assert counted(decode, "handovers") == {reason: 1}


@pytest.mark.parametrize("reason", ["boot_id", "fingerprint", "silent"])
async def test_no_page_is_asked_of_who_does_not_answer_as_the_index_said(
    redis_url: str, reason: str
) -> None:
    """Names of pages tell a prompt to who can guess it."""
    options = {"prefill": "pull", "handover_idle_s": 1.0 if reason == "silent" else 3.0}
    async with running(redis_url, num_prefill=0, decode=options) as cluster:
        (decode,) = cluster.decode
        async with listening(Impostor(wrong_answers(decode)[reason])) as impostor:
            await named(decode, impostor, "prefill")
            assert await answer(decode) == await expected_tokens()
            assert {method for method, _ in impostor.received} == {IDENTIFY}
        assert counted(decode, "pulls") == {reason: 1}


async def test_a_server_of_something_else_is_sent_no_prompt(redis_url: str) -> None:
    async with running(redis_url) as cluster:
        (decode,) = cluster.decode
        async with listening(Impostor(pb.IdentifyResponse())) as impostor:
            await named(decode, impostor, "prefill")
            assert await answer(decode) == await expected_tokens()
            assert {method for method, _ in impostor.received} == {IDENTIFY}
        assert counted(decode, "handovers") == {"boot_id": 1}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The roles of workers that were asked who they are, in order."""
    roles: list[str] = []
    identify = PageServicer.Identify

    async def noted(self: PageServicer, request: Any, context: Any) -> pb.IdentifyResponse:
        roles.append(self._role)
        return await identify(self, request, context)

    monkeypatch.setattr(PageServicer, "Identify", noted)
    return roles


async def handed_over(cluster: Cluster, number: int) -> None:
    """A prompt of its own number is computed by the prefill worker, and everything settled."""
    async with cluster.client() as client:
        (found,) = await client.generate([[number, *LONG]], SamplingParams(max_tokens=1))
    assert found.prefilled == "remote"
    await until(lambda: not cluster.decode[0].worker._desk._background)  # type: ignore[attr-defined]


async def test_a_worker_is_asked_once_and_then_no_request_waits_for_it(
    redis_url: str, asked: list[str]
) -> None:
    async with running(redis_url) as cluster:
        for number in range(4):
            await handed_over(cluster, number)
        assert asked == ["prefill"]


async def test_requests_that_come_together_ask_once(redis_url: str, asked: list[str]) -> None:
    # A prefill worker refuses prompts while half of its pages wait for acknowledgements.
    pool = {"pool_tokens": 8192}
    async with running(redis_url, prefill=pool) as cluster, cluster.client() as client:
        prompts = [[number, *LONG] for number in range(6)]
        await client.generate(prompts, SamplingParams(max_tokens=1))
        assert counted(cluster.decode[0], "handovers") == {"landed": 6}
        assert asked == ["prefill"]


async def test_after_a_reconnect_the_worker_is_asked_again(
    redis_url: str, asked: list[str]
) -> None:
    async with running(redis_url) as cluster:
        (prefill,), (decode,) = cluster.prefill, cluster.decode
        async with Link(int(prefill.endpoint.rpartition(":")[2])) as link:
            record = replace(await prefill.worker._record(link.endpoint), state="serving")
            workers = decode.worker._workers  # type: ignore[attr-defined]
            workers.choose = lambda *_: record
            await handed_over(cluster, 1)
            await link.reset()
            await handed_over(cluster, 2)
            assert asked == ["prefill"] * 2


async def test_an_address_taken_over_while_the_index_still_names_the_old_worker_gets_no_prompt(
    redis_url: str,
) -> None:
    """The connection stood, so nobody asks until it breaks; whoever answers then is another."""
    async with running(redis_url) as cluster:
        (prefill,), (decode,) = cluster.prefill, cluster.decode
        async with (
            Link(int(prefill.endpoint.rpartition(":")[2])) as link,
            listening(Impostor(wrong_answers(decode)["boot_id"])) as impostor,
        ):
            record = replace(await prefill.worker._record(link.endpoint), state="serving")
            workers = decode.worker._workers  # type: ignore[attr-defined]
            workers.choose = lambda *_: record
            await handed_over(cluster, 1)
            link.target = int(impostor.endpoint.rpartition(":")[2])
            await link.reset()
            assert await answer(decode) == await expected_tokens()
            assert {method for method, _ in impostor.received} == {IDENTIFY}
            assert counted(decode, "handovers") == {"landed": 1, "boot_id": 1}


async def test_a_request_that_leaves_while_a_worker_is_asked_leaves_the_others_their_answer(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate = asyncio.Event(), asyncio.Event()
    identify = PageServicer.Identify

    async def late(self: PageServicer, request: Any, context: Any) -> pb.IdentifyResponse:
        begun.set()
        await gate.wait()
        return await identify(self, request, context)

    monkeypatch.setattr(PageServicer, "Identify", late)
    async with running(redis_url) as cluster, cluster.client() as client:
        (decode,) = cluster.decode
        one = SamplingParams(max_tokens=1)
        leaves = asyncio.create_task(client.generate([[1, *LONG]], one))
        await begun.wait()
        stays = asyncio.create_task(client.generate([[2, *LONG]], PARAMS))
        await until(lambda: decode.core.scheduler.num_sequences == 2)
        leaves.cancel()

        async def only_one_left() -> bool:
            return decode.core.scheduler.num_sequences == 1

        await eventually(only_one_left)
        gate.set()
        (found,) = await stays
        assert found.prefilled == "remote"
