"""What the index leaves in Redis, and what it makes of things others leave there."""

from __future__ import annotations

import json
import secrets
import time

import pytest

from kvstore.embedded import EmbeddedRedis
from kvstore.index import HandoverRecord, HandoverState, IndexUnavailable, StaleTransition
from kvstore.index.keys import Keys
from kvstore.index.redis import RedisPageIndex
from kvstore.index.wire import worker_to_json

A, B = "a1" * 16, "b2" * 16
MODEL = "f0" * 16
REQUEST = "c3" * 16
PAGES = [bytes([number]) * 16 for number in range(1, 6)]
LONG_S = 600.0
OFFER = HandoverRecord(REQUEST, 1, HandoverState.OFFERED, A, B, 7, 30.0)
DEEP_JSON = b"[" * 2000


@pytest.fixture
def keys(prefix) -> Keys:
    return Keys(prefix)


async def fill(index: RedisPageIndex, worker, num_rounds: int = 1) -> None:
    """Every kind of change, each of them ``num_rounds`` times."""
    for _ in range(num_rounds):
        await index.register(worker(boot_id=A), LONG_S)
        await index.register(worker(boot_id=B), LONG_S / 2)
        await index.publish(MODEL, PAGES, A, LONG_S)
        await index.publish(MODEL, PAGES, B, LONG_S / 2)
        await index.withdraw(MODEL, PAGES[3:4], A)
        await index.withdraw(MODEL, PAGES[4:], A)
        await index.withdraw(MODEL, PAGES[4:], B)
        await index.unregister(B)
        await index.offer_handover(OFFER, LONG_S)
        await index.move_handover(REQUEST, 1, HandoverState.LANDED)


def content(raw, prefix: str) -> dict[bytes, object]:
    """Everything under the prefix, times left out."""

    def value(key: bytes) -> object:
        if raw.type(key) == b"zset":
            return set(raw.zrange(key, 0, -1))
        return {
            field: stored.split(b" ", 1)[-1]
            for field, stored in raw.hgetall(key).items()
            if field != b"deadline"
        }

    return {key: value(key) for key in raw.scan_iter(f"{prefix}:*")}


async def test_every_key_has_a_time_to_live_no_longer_than_was_given(
    redis_index, raw, prefix, worker
):
    await fill(redis_index, worker)
    ttls_ms = {key: raw.pttl(key) for key in raw.scan_iter(f"{prefix}:*")}
    assert len(ttls_ms) == 1 + 4 + 1  # workers, pages still held, the handover
    for key, ttl_ms in ttls_ms.items():
        assert 0 < ttl_ms <= LONG_S * 1000, key


async def test_every_change_applied_twice_leaves_what_it_left_once(
    redis_index, raw, redis_server, prefix, worker
):
    await fill(redis_index, worker)
    once = content(raw, prefix)
    twice_prefix = f"test-{secrets.token_hex(8)}"
    index = RedisPageIndex(redis_server.url, twice_prefix, timeout_s=5.0)
    await fill(index, worker, num_rounds=2)
    await index.close()
    twice = content(raw, twice_prefix)
    assert len(once) == 6
    assert {
        key.replace(twice_prefix.encode(), prefix.encode()): twice[key] for key in twice
    } == once


async def test_two_installations_on_one_server_do_not_meet(redis_server, prefix, worker):
    one, other = (RedisPageIndex(redis_server.url, f"{prefix}-{name}", 5.0) for name in "ab")
    await fill(one, worker)
    assert await other.workers() == []
    assert await other.lookup(MODEL, PAGES) == []
    assert await other.handover(REQUEST) is None
    await one.close()
    await other.close()


async def test_dead_workers_are_removed_from_redis_when_listed(
    redis_index, raw, keys, worker, assert_eventually
):
    await redis_index.register(worker(boot_id=A), LONG_S)
    await redis_index.register(worker(boot_id=B), 0.05)

    async def b_is_gone():
        return await redis_index.workers() == [worker(boot_id=A)]

    await assert_eventually(b_is_gone)
    assert raw.hkeys(keys.workers) == [A.encode()]


def malformed_workers(good: bytes) -> dict[bytes, bytes]:
    """Boot id and value of things that are almost a worker."""
    deadline = b"%d" % ((time.time() + LONG_S) * 1000)
    record = json.loads(good)

    def stored(endpoint: bytes = b"host:1", **change: object) -> bytes:
        return b"%s %s %s" % (deadline, endpoint, json.dumps(record | change).encode())

    values = [
        b"",
        b"\xff\xfe\x00",
        b"soon host:1 " + good,
        deadline + b" host:1",
        deadline + b" host:1 {",
        deadline + b" host:1 " + DEEP_JSON,
        deadline + b" host:1 null",
        deadline + b" host:1 " + good + b" " * 5000,
        stored(endpoint=b"dns:///elsewhere:1"),
        stored(endpoint=b"unix:/tmp/socket"),
        stored(endpoint=b"\xff:1"),
        stored(role="router"),
        stored(role=["prefill"]),
        stored(state=None),
        stored(fingerprint="f0"),
        stored(model="m" * 257),
        stored(model=5),
        stored(load=None),
        stored(load={}),
        stored(load=record["load"] | {"running": -1}),
        stored(load=record["load"] | {"running": True}),
        stored(load=record["load"] | {"free_pages": 1.5}),
        stored(load=record["load"] | {"free_pages": 2**60}),
    ]
    named = {b"%032x" % number: value for number, value in enumerate(values)}
    return named | {b"not-hex": stored(), b"\xff": stored(), b"0" * 10000: stored()}


async def test_malformed_workers_are_passed_over_counted_and_left_alone(
    redis_index, raw, keys, worker
):
    good = worker()
    await redis_index.register(good, LONG_S)
    bad = malformed_workers(worker_to_json(good))
    raw.hset(keys.workers, mapping=bad)
    assert await redis_index.workers() == [good]
    assert redis_index.num_malformed == len(bad)
    assert raw.hlen(keys.workers) == len(bad) + 1


async def test_worker_takes_the_place_of_a_malformed_value_under_its_identity(
    redis_index, raw, keys, worker
):
    raw.hset(keys.workers, A, "rubbish")
    await redis_index.register(worker(boot_id=A), LONG_S)
    assert await redis_index.workers() == [worker(boot_id=A)]
    assert raw.pttl(keys.workers) > 0


async def test_fields_of_a_newer_version_are_ignored(redis_index, raw, keys, worker):
    await redis_index.register(worker(), LONG_S)
    deadline, endpoint, body = raw.hget(keys.workers, A).split(b" ", 2)
    newer = json.loads(body) | {"zone": "b"}
    newer["load"]["gpus"] = 8
    raw.hset(keys.workers, A, b"%s %s %s" % (deadline, endpoint, json.dumps(newer).encode()))
    assert await redis_index.workers() == [worker()]
    assert redis_index.num_malformed == 0


async def test_malformed_holders_are_passed_over_and_a_page_with_no_other_is_a_miss(
    redis_index, raw, keys
):
    await redis_index.publish(MODEL, PAGES[:3], A, LONG_S)
    far = (time.time() + LONG_S) * 1000
    raw.zadd(keys.page(MODEL, PAGES[0]), {"../etc": far, b"\xff": far})
    raw.zrem(keys.page(MODEL, PAGES[1]), A)
    raw.zadd(keys.page(MODEL, PAGES[1]), {"somebody": far})
    assert await redis_index.lookup(MODEL, PAGES) == [frozenset([A])]
    assert redis_index.num_malformed == 3


async def test_crowded_page_names_only_some_holders(redis_index, raw, keys):
    far = (time.time() + LONG_S) * 1000
    raw.zadd(keys.page(MODEL, PAGES[0]), {f"{number:032x}": far for number in range(1000)})
    (holders,) = await redis_index.lookup(MODEL, PAGES)
    assert 0 < len(holders) <= 64


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attempt", "first"),
        ("attempt", "-1"),
        ("state", "lost"),
        ("prefill", "me"),
        ("decode", b"\xff"),
        ("num_pages", "1e3"),
        ("num_pages", str(2**60)),
        ("num_pages", "1" * 100_000),
        ("deadline", "nan"),
        ("deadline", "9" * 400),
    ],
)
async def test_malformed_handover_is_an_unavailable_index_until_the_next_offer(
    redis_index, raw, keys, field, value
):
    await redis_index.offer_handover(OFFER, LONG_S)
    raw.hset(keys.handover(REQUEST), field, value)
    with pytest.raises(IndexUnavailable):
        await redis_index.handover(REQUEST)
    newer = HandoverRecord(REQUEST, 2, HandoverState.OFFERED, A, B, 7, 30.0)
    await redis_index.offer_handover(newer, LONG_S)
    assert (await redis_index.handover(REQUEST)).attempt == 2


async def test_fields_missing_from_a_handover_make_it_malformed(redis_index, raw, keys):
    raw.hset(keys.handover(REQUEST), "state", "offered")
    with pytest.raises(IndexUnavailable, match="malformed"):
        await redis_index.handover(REQUEST)
    with pytest.raises(StaleTransition):
        await redis_index.move_handover(REQUEST, 1, HandoverState.LANDED)


async def test_values_of_another_type_are_an_unavailable_index_and_nothing_more(
    redis_index, raw, keys, worker
):
    for key in (keys.workers, keys.page(MODEL, PAGES[0]), keys.handover(REQUEST)):
        raw.set(key, "a string", ex=60)
    for call in (
        redis_index.register(worker(), LONG_S),
        redis_index.unregister(A),
        redis_index.workers(),
        redis_index.publish(MODEL, PAGES, A, LONG_S),
        redis_index.lookup(MODEL, PAGES),
        redis_index.withdraw(MODEL, PAGES, A),
        redis_index.offer_handover(OFFER, LONG_S),
        redis_index.move_handover(REQUEST, 1, HandoverState.LANDED),
        redis_index.handover(REQUEST),
    ):
        with pytest.raises(IndexUnavailable, match="WRONGTYPE"):
            await call
    # The server answers, so what is intact still works, at once.
    await redis_index.publish(MODEL, PAGES[1:], A, LONG_S)
    assert len(await redis_index.lookup(MODEL, PAGES[1:])) == 4


async def test_scripts_are_sent_again_to_a_server_that_forgot_them(redis_index, raw, worker):
    await redis_index.register(worker(), LONG_S)
    raw.script_flush()
    await redis_index.register(worker(), LONG_S)
    raw.script_flush()
    assert await redis_index.workers() == [worker()]


async def test_lookup_of_a_long_prompt_is_one_round_trip(redis_index, raw):
    pages = [number.to_bytes(16, "little") for number in range(1300)]
    await redis_index.publish(MODEL, pages, A, LONG_S)
    await redis_index.lookup(MODEL, pages)

    def num_evals() -> int:
        return raw.info("commandstats")["cmdstat_evalsha"]["calls"]

    before = num_evals()
    assert len(await redis_index.lookup(MODEL, pages)) == 1300
    assert num_evals() == before + 1


def test_full_embedded_server_forgets_hints_instead_of_refusing(redis_server: EmbeddedRedis, raw):
    assert raw.config_get("maxmemory-policy")["maxmemory-policy"] == "volatile-ttl"
    assert int(raw.config_get("maxmemory")["maxmemory"]) > 0


def test_prefix_that_would_break_the_hash_tags_is_refused():
    for prefix in ("", "a{b", "a}b"):
        with pytest.raises(ValueError, match="prefix"):
            Keys(prefix)
