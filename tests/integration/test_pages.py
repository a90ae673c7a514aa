"""``quire pages`` on running workers: what is held for nobody is found, and nothing else is."""

from __future__ import annotations

import argparse
import asyncio
import json

import pytest

from engine.cli import pages
from engine.core import EngineCore
from engine.sampling_params import SamplingParams
from kvstore.ledger import PageState
from tests.integration.cluster import Cluster, eventually, running, until
from tests.integration.test_faults import pull, release

PROMPT = list(range(100))
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LOOK_AGAIN_S", 0.05)


def endpoints(cluster: Cluster) -> list[str]:
    return [node.endpoint for node in cluster.nodes]


async def test_while_requests_run_every_page_has_somebody_who_answers_for_it(
    redis_url: str,
) -> None:
    async with running(redis_url) as cluster, cluster.client() as client:
        streams = [client.stream([number, *PROMPT], ENDLESS) for number in range(4)]
        for stream in streams:
            await anext(stream)
        found = await pages.look(endpoints(cluster), redis_url, check=True)
        assert not found.orphans
        assert not found.broken
        assert not found.index_error
        decode = found.workers[1]
        assert decode["problems"] == []
        assert len([page for page in decode["pages"] if page["owners"]]) >= 4 * 7
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]


async def test_pages_of_a_sequence_that_nobody_waits_for_are_found(redis_url: str) -> None:
    async with running(redis_url, num_prefill=0) as cluster, cluster.client() as client:
        node = cluster.decode[0]
        stream = client.stream(PROMPT, ENDLESS)
        await anext(stream)
        forgotten = node.worker.engine._mailboxes
        (name,) = forgotten
        mailbox = forgotten.pop(name)
        found = await pages.look(endpoints(cluster), check=True)
        assert found.broken
        assert {name in problem for _, _, problem in found.orphans} == {True}
        forgotten[name] = mailbox
        assert not (await pages.look(endpoints(cluster), check=True)).broken
        await stream.aclose()  # type: ignore[attr-defined]


async def test_a_lease_of_a_request_that_no_decode_service_knows_is_found(redis_url: str) -> None:
    async with running(redis_url) as cluster:
        await pull(cluster.prefill[0], attempt=1)
        found = await pages.look(endpoints(cluster), redis_url)
        assert found.orphans
        told = f"leased to {'00' * 16}/1, a request no decode service knows"
        assert {problem for _, _, problem in found.orphans} == {told}
        await release(cluster.prefill[0], attempt=1)
        await cluster.balanced()
        assert not (await pages.look(endpoints(cluster), redis_url)).orphans


async def test_a_quarantined_page_says_whose_write_it_waits_for(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is gone, and who fills its pages has not noticed yet."""
    async with running(redis_url) as cluster, cluster.client() as client:
        node, entered, leave = cluster.decode[0], asyncio.Event(), asyncio.Event()
        hand_over = node.worker._desk._hand_over  # type: ignore[attr-defined]

        async def slow_to_leave(*arguments: object) -> object:
            entered.set()
            try:
                return await hand_over(*arguments)
            finally:
                await leave.wait()

        monkeypatch.setattr(node.worker._desk, "_hand_over", slow_to_leave)  # type: ignore[attr-defined]
        cluster.prefill[0].model.gate.clear()
        work = asyncio.create_task(client.generate([PROMPT], ENDLESS))
        await entered.wait()
        (name,) = node.core.scheduler.holders.written
        work.cancel()
        await until(lambda: node.core.pool.ledger.count(PageState.QUARANTINED) > 0)
        found = await pages.look([node.endpoint], check=True)
        waiting = [page for page in found.workers[0]["pages"] if page["state"] == "quarantined"]
        assert waiting
        for page in waiting:
            assert page["reason"] == f"waits for the end of the write for {name}"
        assert not found.broken
        cluster.prefill[0].model.gate.set()
        leave.set()


async def test_an_entry_of_the_index_for_a_page_that_nobody_keeps_is_found(redis_url: str) -> None:
    async with running(redis_url) as cluster, cluster.client() as client:
        await client.generate([PROMPT], SamplingParams(temperature=0, max_tokens=2))
        index, core = cluster.decode[0].worker.index, cluster.decode[0].core

        async def told() -> bool:
            return len(await index.entries()) > 0

        await eventually(told)
        assert not (await pages.look(endpoints(cluster), redis_url)).stale_entries
        fingerprint, boot_id = core.fingerprint.digest.hex(), core.boot_id.hex()
        await index.publish(fingerprint, [b"x" * 16], boot_id, 60.0)
        found = await pages.look(endpoints(cluster), redis_url)
        problem = "in the index, but its holder does not keep it"
        assert found.stale_entries == {(boot_id, f"page {(b'x' * 16).hex()}", problem)}
        assert not found.broken


@pytest.mark.parametrize("check", [True, False])
async def test_the_command_fails_a_check_that_finds_a_lost_page(
    redis_url: str, capsys: pytest.CaptureFixture[str], check: bool
) -> None:
    async with running(redis_url, num_prefill=0) as cluster:
        node = cluster.decode[0]
        options = argparse.Namespace(
            endpoint=[node.endpoint], redis=redis_url, check=check, json=True
        )
        assert await asyncio.to_thread(pages.run, options) == 0

        def lose(core: EngineCore) -> list[int] | None:
            return core.pool.allocate(1, "ghost")

        lost = await node.worker.engine.call(lose)
        assert lost is not None
        capsys.readouterr()
        assert await asyncio.to_thread(pages.run, options) == int(check)
        told = json.loads(capsys.readouterr().out)
        assert "ghost" in told["orphans"][0]["problem"]
        assert "problems" not in told["workers"][0] or "ghost" in told["workers"][0]["problems"][0]
        await node.worker.engine.call(lambda core: core.pool.release(lost, "ghost"))
