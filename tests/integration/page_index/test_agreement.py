"""Memory and Redis answer alike, whatever is asked of them in whatever order."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.index import (
    HandoverRecord,
    HandoverState,
    PageIndex,
    PageIndexError,
    WorkerLoad,
    WorkerRecord,
)
from kvstore.index.memory import MemoryPageIndex
from kvstore.index.redis import RedisPageIndex

LONG_S = 600.0
Operation = Callable[[PageIndex], Awaitable[Any]]

boot_ids = st.sampled_from(["a1" * 16, "b2" * 16, "c3" * 16])
fingerprints = st.sampled_from(["f0" * 16, "0f" * 16])
request_ids = st.sampled_from(["d4" * 16, "e5" * 16])
attempts = st.sampled_from([1, 2, 10])
pages = st.lists(st.sampled_from([bytes([number]) * 16 for number in range(4)]), max_size=5)
roles = st.sampled_from(["prefill", "decode"])

workers = st.builds(
    WorkerRecord,
    boot_id=boot_ids,
    role=roles,
    endpoint=st.sampled_from(["host:1", "host:2"]),
    fingerprint=fingerprints,
    model=st.text(max_size=8),
    load=st.builds(WorkerLoad, *[st.integers(0, 2**53 - 1)] * 5),
    state=st.sampled_from(["serving", "draining"]),
)
offers = st.builds(
    HandoverRecord,
    request_id=request_ids,
    attempt=attempts,
    state=st.just(HandoverState.OFFERED),
    prefill_boot_id=boot_ids,
    decode_boot_id=boot_ids,
    num_pages=st.integers(0, 2),
    remaining_s=st.just(LONG_S),
)
ends = st.sampled_from([state for state in HandoverState if state is not HandoverState.OFFERED])


def calls(method: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.tuples(st.just(method), st.tuples(*arguments))


operations = st.one_of(
    calls("register", workers, st.just(LONG_S)),
    calls("unregister", boot_ids),
    calls("workers", st.none() | roles),
    calls("publish", fingerprints, pages, boot_ids, st.just(LONG_S)),
    calls("lookup", fingerprints, pages),
    calls("withdraw", fingerprints, pages, boot_ids),
    calls("offer_handover", offers, st.just(LONG_S)),
    calls("move_handover", request_ids, attempts, ends),
    calls("handover", request_ids),
)


async def outcome(index: PageIndex, method: str, arguments: tuple[Any, ...]) -> object:
    """What the call returned or raised; the passing of time is left out."""
    try:
        result = await getattr(index, method)(*arguments)
    except PageIndexError as error:
        return type(error)
    return replace(result, remaining_s=LONG_S) if isinstance(result, HandoverRecord) else result


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(operations, max_size=30))
async def test_memory_and_redis_agree_on_every_sequence_of_calls(redis_server, steps):
    memory = MemoryPageIndex()
    redis = RedisPageIndex(redis_server.url, f"test-{secrets.token_hex(8)}", timeout_s=5.0)
    try:
        for method, arguments in steps:
            expected = await outcome(memory, method, arguments)
            assert await outcome(redis, method, arguments) == expected, (method, arguments)
    finally:
        await redis.close()
