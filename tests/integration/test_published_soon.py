"""A page is in the index soon after it was sealed: a burst on a fresh prefix can pull it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from engine import registration
from kvstore.index import IndexUnavailable
from tests.integration.cluster import Node, eventually, running, until
from tests.integration.reuse import (
    LONG,
    NUM_PAGES,
    answer,
    counted,
    expected_tokens,
    num_computed,
    page_names,
)

PULL = {"prefill": "pull"}


@pytest.fixture(autouse=True)
def _no_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first one nobody is told of anything by a heartbeat."""
    monkeypatch.setattr(registration, "HEARTBEAT_S", 600.0)


async def known(node: Node, to: Node) -> None:
    boot_id = node.worker.boot_id.hex()
    await until(lambda: boot_id in to.worker._workers._known)  # type: ignore[attr-defined]


async def all_published(node: Node, prompt: Sequence[int] = LONG) -> None:
    names, fingerprint = page_names(node, prompt), node.core.fingerprint.digest.hex()

    async def told() -> bool:
        return len(await node.worker.index.lookup(fingerprint, names)) == len(names)

    await eventually(told, 5.0)


async def test_a_prefix_is_pulled_right_after_the_first_answer(redis_url: str) -> None:
    async with running(redis_url, num_prefill=0, num_decode=2, decode=PULL) as cluster:
        owner, reader = cluster.decode
        await known(owner, to=reader)
        await answer(owner)
        await all_published(owner)
        assert await answer(reader) == await expected_tokens()
        assert counted(reader, "pulled_pages") == {"": NUM_PAGES}
        assert num_computed(reader) == len(LONG) - 1 - NUM_PAGES * 16


async def test_what_a_prefill_worker_computed_is_pulled_by_the_next_decode_worker(
    redis_url: str,
) -> None:
    async with running(redis_url, num_decode=2, decode=PULL) as cluster:
        prefill, (first, second) = cluster.prefill[0], cluster.decode
        await answer(first)
        await all_published(prefill)
        first.worker._registration.reachable = False  # type: ignore[union-attr]
        await first.worker.index.unregister(first.worker.boot_id.hex())
        second.worker._workers._known.clear()  # type: ignore[attr-defined]
        await known(prefill, to=second)
        assert await answer(second) == await expected_tokens()
        assert counted(second, "pulled_pages") == {"": NUM_PAGES}
        assert counted(prefill, "leases") == {"granted": 1}


async def test_pages_sealed_one_after_the_other_are_told_together(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(redis_url, num_prefill=0) as cluster:
        (node,) = cluster.decode
        index: Any = node.worker.index
        publish, told = index.publish, []

        async def counting(fingerprint: str, names: list[bytes], *args: Any) -> None:
            told.append(len(names))
            await publish(fingerprint, names, *args)

        monkeypatch.setattr(index, "publish", counting)
        began = time.monotonic()
        await answer(node)
        await answer(node, [*range(199, -1, -1)] * 3)
        await all_published(node)
        await all_published(node, [*range(199, -1, -1)] * 3)
        elapsed = time.monotonic() - began
        assert sum(told) >= 2 * NUM_PAGES
        assert len(told) <= elapsed / registration.NEWS_EVERY_S + 2


async def test_what_a_silent_index_did_not_hear_is_told_by_the_next_heartbeat(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(redis_url, num_prefill=0) as cluster:
        (node,) = cluster.decode
        index: Any = node.worker.index
        publish = index.publish

        async def unheard(*args: Any) -> None:
            raise IndexUnavailable("no answer")

        monkeypatch.setattr(index, "publish", unheard)
        await answer(node)
        own = node.worker._registration
        assert own is not None
        await until(lambda: not own.reachable)
        monkeypatch.setattr(index, "publish", publish)
        await own.beat()
        await all_published(node)
