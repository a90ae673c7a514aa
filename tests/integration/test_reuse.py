"""Pages that one worker has in its cache, read by another instead of computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.telemetry.trace_tree import read_spans
from tests.integration.cluster import running
from tests.integration.reuse import (
    LONG,
    NUM_PAGES,
    PAGE,
    answer,
    counted,
    expected_tokens,
    num_computed,
    published,
)

PULL = {"prefill": "pull"}
REST = len(LONG) - 1 - PAGE * NUM_PAGES


@pytest.mark.parametrize("transport", ["grpc", "shm"])
async def test_a_prefix_that_one_decode_service_computed_is_read_by_another(
    redis_url: str, transport: str
) -> None:
    async with running(
        redis_url, num_prefill=0, num_decode=2, decode=PULL, transports=(transport,)
    ) as cluster:
        owner, reader = cluster.decode
        first = await answer(owner)
        await published(owner, to=reader)
        assert first == await answer(reader) == await expected_tokens()
        assert counted(reader, "pulls") == {"landed": 1}
        assert counted(reader, "pulled_pages") == {"": NUM_PAGES}
        assert counted(reader, "pulled_bytes") == counted(owner, "lent_bytes")
        assert num_computed(reader) == REST


async def test_a_prefix_is_read_from_the_prefill_worker_that_built_it(redis_url: str) -> None:
    async with running(redis_url, num_decode=2, decode=PULL) as cluster:
        prefill, (first, second) = cluster.prefill[0], cluster.decode
        assert await answer(first) == await expected_tokens()
        assert counted(first, "handovers") == {"landed": 1}
        computed = num_computed(prefill)
        await published(prefill, to=second)
        assert await answer(second) == await expected_tokens()
        assert counted(second, "pulled_pages") == {"": NUM_PAGES}
        assert num_computed(second) == REST
        assert num_computed(prefill) == computed


async def test_after_a_pulled_prefix_the_rest_is_handed_over(redis_url: str) -> None:
    longer = [*LONG, *range(100)]
    async with running(redis_url, num_decode=2, decode=PULL) as cluster:
        prefill, (owner, reader) = cluster.prefill[0], cluster.decode
        await answer(owner)
        await published(owner, to=reader)
        assert await answer(reader, longer) == await expected_tokens(longer)
        assert counted(reader, "pulled_pages") == {"": NUM_PAGES}
        assert counted(reader, "handovers") == {"landed": 1}
        assert num_computed(reader) == 0
        assert num_computed(prefill) == len(LONG) - 1 + len(longer) - 1 - PAGE * NUM_PAGES


async def test_what_is_here_already_is_not_pulled(redis_url: str) -> None:
    async with running(redis_url, num_prefill=0, num_decode=2, decode=PULL) as cluster:
        owner, reader = cluster.decode
        await answer(reader, LONG[:200])
        await answer(owner)
        await published(owner, to=reader)
        assert await answer(reader) == await expected_tokens()
        assert counted(reader, "pulled_pages") == {"": NUM_PAGES - 200 // PAGE}


async def test_pulled_pages_are_lent_on(redis_url: str) -> None:
    async with running(redis_url, num_prefill=0, num_decode=3, decode=PULL) as cluster:
        owner, reader, last = cluster.decode
        await answer(owner)
        await published(owner, to=reader)
        await answer(reader)
        await owner.worker.engine.call(lambda core: core.pool.clear_cache())
        await published(reader, to=last)
        await published(owner, to=last)
        assert await answer(last) == await expected_tokens()
        assert counted(last, "pulled_pages") == {"": NUM_PAGES}
        assert counted(reader, "leases") == {"granted": 1}


async def test_a_prompt_goes_to_the_prefill_worker_that_has_its_prefix(redis_url: str) -> None:
    """Of two idle workers the one with the lower identity would be chosen."""
    async with running(redis_url, num_prefill=2, num_decode=2) as cluster:
        first, second = cluster.decode
        cluster.prefill.sort(key=lambda node: node.worker.boot_id)
        lower, higher = cluster.prefill
        lower.worker.state = "draining"
        await published(lower, to=first)
        await answer(first)
        lower.worker.state = "serving"
        await published(lower, to=second)
        await published(higher, to=second)
        longer = [*LONG, *range(100)]
        assert await answer(second, longer) == await expected_tokens(longer)
        assert num_computed(lower) == 0
        assert num_computed(higher) == len(LONG) - 1 + len(longer) - 1 - PAGE * NUM_PAGES


async def test_left_to_itself_a_service_pulls_what_is_predicted_to_be_faster_that_way(
    redis_url: str,
) -> None:
    auto = {"prefill": "auto"}
    async with running(redis_url, num_prefill=0, num_decode=2, decode=auto) as cluster:
        owner, reader = cluster.decode
        await answer(owner)
        await published(owner, to=reader)
        decider = reader.worker._desk._decider  # type: ignore[attr-defined]
        costs = decider.peers.of(owner.worker.boot_id.hex())
        assert costs.pulling.measured_at is None
        assert await answer(reader) == await expected_tokens()
        assert counted(reader, "pulls") == {"landed": 1}
        costs = decider.peers.of(owner.worker.boot_id.hex())
        assert costs.pulling.measured_at is not None
        assert owner.worker._desk._decider._local.measured_at is not None  # type: ignore[attr-defined]


async def test_tenants_never_share_pages_across_workers(redis_url: str) -> None:
    async with running(redis_url, num_prefill=0, num_decode=2, decode=PULL) as cluster:
        owner, reader = cluster.decode
        await answer(owner, tenant="one")
        await published(owner, to=reader)
        assert await answer(reader, tenant="two") == await expected_tokens()
        assert counted(reader, "pulls") == {}
        await answer(reader, tenant="one")
        assert counted(reader, "pulls") == {"landed": 1}


@pytest.mark.parametrize("preference", ["auto", "remote", "pull", "local"])
async def test_the_trace_says_which_way_was_taken_and_why(
    redis_url: str, tmp_path: Path, preference: str
) -> None:
    trace = tmp_path / "trace.jsonl"
    decode = {"trace_file": trace, "prefill": preference}
    async with running(redis_url, decode=decode) as cluster:
        await answer(cluster.decode[0])
    chosen = [span.attributes for span in read_spans(trace) if span.name == "choose"]
    if preference == "local":
        assert chosen == []
        return
    (told,) = chosen
    assert told["quire.way"] == "remote"
    assert told["quire.why"] == ("least" if preference == "auto" else "forced")
    assert 0 < told["quire.predicted_remote_s"] < told["quire.predicted_local_s"]
    assert told["quire.missing_tokens"] == len(LONG) - 1
    assert told["quire.worker"] == cluster.prefill[0].worker.boot_id.hex()
