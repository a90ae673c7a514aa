"""The page index in Redis, Valkey, or anything that speaks their protocol and runs Lua (7.0 on).

Every change is one script that may be run twice, so a caller may repeat what failed; the client
itself never retries. Every call ends within ``timeout_s``, connecting included.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from kvstore.index import (
    HandoverRecord,
    HandoverState,
    IdentityConflict,
    IndexUnavailable,
    PageEntry,
    StaleTransition,
    WorkerRecord,
    WorkerRole,
)
from kvstore.index.breaker import Breaker
from kvstore.index.keys import Keys
from kvstore.index.records import check_end, check_hex128, check_offer, check_pages, check_ttl
from kvstore.index.scripts import source
from kvstore.index.wire import (
    MALFORMED,
    MAX_FIELD_BYTES,
    MAX_WORKER_BYTES,
    change_from_reply,
    handover_from_reply,
    holders_from_reply,
    worker_to_json,
    workers_from_reply,
)

Result = TypeVar("Result")
Argument = str | bytes | int

MAX_CONNECTIONS = 8
MAX_HOLDERS = 64
# A longer script would keep the server from everyone else for too long.
PAGES_PER_CHANGE = 512
KEYS_PER_SCAN = 512

SCRIPTS = (
    "worker_register",
    "worker_list",
    "page_publish",
    "page_lookup",
    "page_withdraw",
    "handover_offer",
    "handover_move",
    "handover_read",
)


class RedisPageIndex:
    """``url`` is redis://, rediss:// or unix://; ``prefix`` keeps installations apart.

    After a call that got no answer, the next ``breaker_cooldown_s`` seconds fail at once.
    """

    def __init__(
        self,
        url: str,
        prefix: str = "quire",
        timeout_s: float = 0.2,
        breaker_cooldown_s: float = 1.0,
    ) -> None:
        self._redis = _connect(url, timeout_s)
        self._keys = Keys(prefix)
        self._timeout_s = timeout_s
        self._breaker = Breaker(breaker_cooldown_s, time.monotonic)
        self._scripts = {name: self._redis.register_script(source(name)) for name in SCRIPTS}
        self._num_malformed = 0
        self._closed = False

    @property
    def num_malformed(self) -> int:
        """Values met so far that this version cannot read; they were passed over."""
        return self._num_malformed

    async def register(self, record: WorkerRecord, ttl_s: float) -> None:
        check_ttl(ttl_s)
        arguments = (record.boot_id, record.endpoint, worker_to_json(record), _ms(ttl_s))
        if not await self._change("worker_register", [self._keys.workers], *arguments):
            raise IdentityConflict(record)

    async def unregister(self, boot_id: str) -> None:
        await self._ask(lambda: self._redis.hdel(self._keys.workers, boot_id))

    async def workers(self, role: WorkerRole | None = None) -> list[WorkerRecord]:
        workers, num_malformed = await self._run(
            workers_from_reply, "worker_list", [self._keys.workers], MAX_WORKER_BYTES
        )
        self._num_malformed += num_malformed
        fit = (record for record in workers if role in (None, record.role))
        return sorted(fit, key=lambda record: record.boot_id)

    async def publish(
        self, fingerprint: str, prefix_hashes: Sequence[bytes], boot_id: str, ttl_s: float
    ) -> None:
        check_hex128("boot_id", boot_id)
        check_ttl(ttl_s)
        for pages in self._portions(fingerprint, prefix_hashes):
            await self._change("page_publish", pages, boot_id, _ms(ttl_s))

    async def lookup(
        self, fingerprint: str, prefix_hashes: Sequence[bytes]
    ) -> list[frozenset[str]]:
        check_pages(fingerprint, prefix_hashes)
        if not prefix_hashes:
            return []
        pages = [self._keys.page(fingerprint, each) for each in prefix_hashes]
        found, num_malformed = await self._run(
            holders_from_reply, "page_lookup", pages, MAX_HOLDERS
        )
        self._num_malformed += num_malformed
        return found

    async def withdraw(
        self, fingerprint: str, prefix_hashes: Sequence[bytes], boot_id: str
    ) -> None:
        for pages in self._portions(fingerprint, prefix_hashes):
            await self._change("page_withdraw", pages, boot_id)

    async def entries(self) -> list[PageEntry]:
        return [
            PageEntry(fingerprint, prefix_hash, found[0])
            for fingerprint, prefix_hash in sorted(await self._page_keys())
            if (found := await self.lookup(fingerprint, [prefix_hash]))
        ]

    async def _page_keys(self) -> set[tuple[str, bytes]]:
        """Fingerprint and prefix hash of every key that is one of a page."""
        pages, cursor = set(), 0
        while True:
            cursor, keys = await self._ask(partial(self._scan, cursor))
            pages |= {page for key in keys if (page := self._keys.parse_page(key))}
            if not cursor:
                return pages

    async def _scan(self, cursor: int) -> Any:
        return await self._redis.scan(cursor, match=self._keys.all_pages, count=KEYS_PER_SCAN)

    async def offer_handover(self, record: HandoverRecord, ttl_s: float) -> None:
        check_offer(record)
        check_ttl(ttl_s)
        accepted = await self._change(
            "handover_offer",
            [self._keys.handover(record.request_id)],
            record.attempt,
            record.prefill_boot_id,
            record.decode_boot_id,
            record.num_pages,
            _ms(record.remaining_s),
            _ms(ttl_s),
        )
        if not accepted:
            raise StaleTransition(record.request_id, record.attempt, record.state)

    async def move_handover(self, request_id: str, attempt: int, to_state: HandoverState) -> None:
        check_end(to_state)
        key = self._keys.handover(request_id)
        if not await self._change("handover_move", [key], attempt, to_state.value):
            raise StaleTransition(request_id, attempt, to_state)

    async def handover(self, request_id: str) -> HandoverRecord | None:
        read = partial(handover_from_reply, request_id)
        key = self._keys.handover(request_id)
        return await self._run(read, "handover_read", [key], MAX_FIELD_BYTES)

    async def close(self) -> None:
        self._closed = True
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                await self._redis.aclose()

    def _portions(self, fingerprint: str, prefix_hashes: Sequence[bytes]) -> Iterator[list[str]]:
        """The pages' keys, in lists as long as one script may change."""
        check_pages(fingerprint, prefix_hashes)
        for start in range(0, len(prefix_hashes), PAGES_PER_CHANGE):
            portion = prefix_hashes[start : start + PAGES_PER_CHANGE]
            yield [self._keys.page(fingerprint, each) for each in portion]

    async def _change(self, script: str, keys: Sequence[str], *arguments: Argument) -> bool:
        return await self._run(change_from_reply, script, keys, *arguments)

    async def _run(
        self, read: Callable[[Any], Result], script: str, keys: Sequence[str], *arguments: Argument
    ) -> Result:
        reply = await self._ask(lambda: self._scripts[script](keys=keys, args=arguments))
        try:
            return read(reply)
        except MALFORMED as error:
            self._num_malformed += 1
            raise IndexUnavailable(f"malformed reply to {script}: {error!r}") from error

    async def _ask(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """One bounded call; whatever goes wrong is an IndexUnavailable."""
        if self._closed:
            raise IndexUnavailable("the page index is closed")
        if not self._breaker.admits():
            raise IndexUnavailable("the page index did not answer a moment ago")
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await call()
        except ResponseError as error:
            # It answers, though not what we need: no reason to stay away from it.
            self._breaker.succeeded()
            raise IndexUnavailable(f"the page index refused: {error}") from error
        except (RedisError, OSError, TimeoutError, RuntimeError) as error:
            # RuntimeError is what uvloop says of a write to a connection that was reset.
            self._breaker.failed()
            raise IndexUnavailable(f"the page index is out of reach: {error!r}") from error
        self._breaker.succeeded()
        return reply


def _connect(url: str, timeout_s: float) -> Redis:
    """A client that never retries by itself: its default is ten times, whatever the command."""
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        driver_info=None,
    )
    return Redis.from_pool(pool)


def _ms(seconds: float) -> int:
    """Whole milliseconds, at least one: Redis refuses to keep anything for none."""
    return max(1, round(seconds * 1000))
