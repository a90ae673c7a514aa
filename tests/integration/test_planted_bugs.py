"""Every guard of the handover has a scenario that fails without it.

A guard is one small function of the product. Here it is taken out, as a bug would, and the scenario
that passes with it must fail: so each scenario detects what its guard is for, and no other guard
hides the loss of this one. Nothing outside the tests can switch a guard off.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest

from decode_svc.fetch import Fetcher
from engine.core import CoreSettings, EngineCore
from engine.errors import StaleAttempt
from engine.generation import GenerateTask, PrefillTask
from engine.local import AsyncLocalEngine
from engine.model.hash_model import HashModel, HashTokenizer
from engine.outputs import Output, PagesComing, Reserved, TokenOutput
from engine.plan import Cancel, Landed, ReadsEnded
from engine.sampling_params import SamplingParams
from engine.scheduler import SchedulerLimits
from engine.serving import leases
from engine.serving.leases import Leases
from kernels.layout import read_tokens
from kvstore import landing
from kvstore.landing import Landing, LandingError, PageBook
from kvstore.ledger import PageRecord
from kvstore.memory import LayerGroups, PageDigests, PageMemory
from kvstore.page import Commit, PageFrame, PageIdentity, digest_of
from kvstore.prefix_hash import PrefixHasher
from kvstore.shared_pool import SharedPool
from kvstore.transports import PageSource, StreamTransport, receive, shm
from prefill_svc.export import Export
from tests.integration.cluster import running
from tests.integration.reuse import answer, counted, published

PAGE = 16
OWNER = b"o" * 16
PROMPT = tuple(range(3 * PAGE + 1))
OTHER = tuple(range(100, 100 + 3 * PAGE + 1))
GREEDY = SamplingParams(temperature=0, ignore_eos=True)


class Box:
    """A worker's engine without its service."""

    def __init__(self, num_pages: int, memory: PageMemory | None = None) -> None:
        settings = CoreSettings(num_pages, PAGE, SchedulerLimits(min_remote_tokens=PAGE))
        model, tokenizer = HashModel("fp32"), HashTokenizer()
        self.core = EngineCore(model, tokenizer.token_bytes, settings, OWNER, memory=memory)
        self.outputs: list[Output] = []

    def run(self, max_steps: int = 1000) -> None:
        """Until there is nothing to do."""
        for _ in range(max_steps):
            if not self.core.step(self.outputs.extend):
                return

    def prefill(self, name: str, prompt: Sequence[int]) -> list[PageIdentity]:
        """The prompt's pages, announced; reads of them have begun."""
        self.core.submit([PrefillTask(name, tuple(prompt))])
        self.run()
        announced = [each for each in self.outputs if isinstance(each, PagesComing)]
        return [page for each in announced if each.name == name for page in each.pages]

    def read_and_released(self, name: str, pages: Sequence[PageIdentity]) -> None:
        """Nobody reads the pages any more, and nobody has a lease on them."""
        self.core.post(ReadsEnded(name, tuple(page.reference.slot for page in pages)))
        self.core.post(Cancel(name))
        self.run()

    def generate(self, name: str, prompt: Sequence[int], *, remote: bool = False) -> None:
        self.core.submit([GenerateTask(name, tuple(prompt), GREEDY, 0, 8, remote=remote)])

    def tokens(self, name: str) -> list[int]:
        found = [each for each in self.outputs if isinstance(each, TokenOutput)]
        return [each.token_id for each in found if each.name == name]

    def bytes_of(self, page: PageIdentity) -> bytes:
        return self.core.memory.bytes[page.reference.slot].numpy().tobytes()

    def frames(self, pages: Sequence[PageIdentity], *, payload: bool = True) -> list[PageFrame]:
        memory, digests = self.core.memory, PageDigests(self.core.memory)
        count = memory.groups.count
        return [
            PageFrame(
                identity=page,
                layer_group=group,
                num_layer_groups=count,
                payload=bytes(memory.group(page.reference.slot, group)) if payload else None,
                digest=digests.of(page, group),
            )
            for page in pages
            for group in range(count)
        ]

    def commit(self, frames: Sequence[PageFrame], prompt: Sequence[int]) -> Commit:
        """As it follows from the frames sent."""
        count = self.core.memory.groups.count
        digests = [frame.digest for frame in frames]
        seals = [digest_of(digests[at : at + count]) for at in range(0, len(digests), count)]
        last = frames[-1].identity.reference.prefix_hash
        return Commit(len(seals), len(prompt) - 1, digest_of(seals), last)


async def land(
    box: Box, prompt: Sequence[int], frames: Sequence[PageFrame], source: PageSource | None = None
) -> PageMemory:
    """What a receiver of ``prompt`` makes of the frames. Raises LandingError."""
    core = box.core
    memory = PageMemory(core.layout, 4)
    receiver = Landing(
        memory=memory,
        hasher=PrefixHasher("", core.fingerprint.digest, PAGE),
        prompt_ids=prompt,
        first_page=0,
        slots=range(len(frames) // core.memory.groups.count),
        fingerprint=core.fingerprint.digest,
        owner=OWNER,
    )
    source = source or await StreamTransport().connect(b"", OWNER, core.layout)
    await receive(frames, receiver, source)
    receiver.finish(box.commit(frames, prompt))
    receiver.check_committed()
    return memory


async def assert_right_or_refused(
    box: Box, pages: Sequence[PageIdentity], frames: Sequence[PageFrame]
) -> None:
    """Either the prompt's own pages are taken in, or none are."""
    with suppress(LandingError):
        memory = await land(box, PROMPT, frames)
        taken = [memory.bytes[index].numpy().tobytes() for index in range(len(pages))]
        assert taken == [box.bytes_of(page) for page in pages]


async def a_bit_that_flips_on_the_way_is_noticed(_: str, __: pytest.MonkeyPatch) -> None:
    box = Box(4)
    pages = box.prefill("a", PROMPT)
    frames = box.frames(pages)
    payload = bytearray(frames[2].payload or b"")
    payload[7] ^= 1
    frames[2] = replace(frames[2], payload=bytes(payload))
    await assert_right_or_refused(box, pages, frames)


async def a_valid_page_of_another_prompt_is_noticed(_: str, __: pytest.MonkeyPatch) -> None:
    """Bytes and digest are sound, and belong to each other, but not to the page named."""
    box = Box(8)
    pages, others = box.prefill("a", PROMPT), box.frames(box.prefill("b", OTHER))
    frames = [
        replace(frame, payload=other.payload, digest=other.digest)
        for frame, other in zip(box.frames(pages), others, strict=True)
    ]
    await assert_right_or_refused(box, pages, frames)


async def a_reference_to_a_slot_that_was_given_away_is_noticed(
    _: str, __: pytest.MonkeyPatch
) -> None:
    """Even where the slot holds the very same bytes again: the reference does not name them."""
    layout = Box(1).core.layout
    pool = SharedPool.create(1, layout.page_bytes)
    box = Box(1, PageMemory(layout, 1, pool))
    prompt = PROMPT[: PAGE + 1]
    pages = box.prefill("a", prompt)
    stale = box.frames(pages, payload=False)
    box.read_and_released("a", pages)
    box.core.pool.clear_cache()
    box.prefill("again", prompt)
    ours, theirs = socket.socketpair()
    source = shm.MappedPool(pool, LayerGroups(layout), ours)
    try:
        reason = ""
        try:
            await land(box, prompt, stale, source)
        except LandingError as error:
            reason = error.reason
        assert reason == "generation"
    finally:
        source.close()
        theirs.close()
        pool.close()


async def a_late_release_of_an_old_attempt_frees_nothing(_: str, __: pytest.MonkeyPatch) -> None:
    freed: list[int] = []
    table, request = Leases(10.0, lambda: 0.0), bytes(16)
    for attempt in (1, 2):
        table.begin(request, attempt, lambda attempt=attempt: freed.append(attempt))
    table.granted(request, 2)
    with suppress(StaleAttempt):
        table.release(request, 1)
    assert freed == [1]


async def bytes_do_not_change_under_a_reader(_: str, __: pytest.MonkeyPatch) -> None:
    box = Box(4)
    pages = box.prefill("a", PROMPT)
    before = [box.bytes_of(page) for page in pages]
    box.core.post(Cancel("a"))
    box.generate("b", OTHER)
    box.run()
    assert [box.bytes_of(page) for page in pages] == before
    box.core.post(ReadsEnded("a", tuple(page.reference.slot for page in pages)))
    box.run()
    assert len(box.tokens("b")) == 8


async def a_late_writer_writes_into_nobodys_page(_: str, __: pytest.MonkeyPatch) -> None:
    alone = Box(4)
    alone.generate("b", OTHER)
    alone.run()
    box = Box(4)
    box.generate("a", PROMPT, remote=True)
    box.run()
    (reserved,) = (each for each in box.outputs if isinstance(each, Reserved))
    box.core.post(Cancel("a"))
    box.generate("b", OTHER)
    box.run(max_steps=3)
    for slot in reserved.reservation.slots:
        box.core.memory.bytes[slot] = 0
    box.core.post(Landed("a", 0))
    box.run()
    assert box.tokens("b") == alone.tokens("b")


async def without_a_commit_no_token_comes_from_the_pages(
    redis_url: str, patch: pytest.MonkeyPatch
) -> None:
    """The stream ends well, in the middle."""
    messages = Export.messages

    async def cut_short(self: Export) -> AsyncIterator[object]:
        num_sent = 0
        async for message in messages(self):
            if not num_sent:
                yield message
            num_sent += isinstance(message, list)

    patch.setattr(Export, "messages", cut_short)
    prompt, params = list(range(250)), replace(GREEDY, max_tokens=8)
    async with AsyncLocalEngine("hash") as engine:
        (expected,) = await engine.generate([prompt], params)
    async with running(redis_url) as cluster, cluster.client() as client:
        (found,) = await client.generate([prompt], params)
    assert found.token_ids == expected.token_ids


async def nothing_of_what_a_slot_held_before_leaves_with_a_page(
    _: str, __: pytest.MonkeyPatch
) -> None:
    box = Box(4)
    box.read_and_released("old", box.prefill("old", range(4 * PAGE + 1)))
    box.core.pool.clear_cache()
    last = box.prefill("new", OTHER[: PAGE + 5])[-1]
    assert last.num_tokens == 4
    for kind in read_tokens(box.core.memory.kv[last.reference.slot], box.core.layout):
        assert not kind[:, :, last.num_tokens :].any()


async def what_was_read_after_its_lease_is_not_used(
    redis_url: str, patch: pytest.MonkeyPatch
) -> None:
    """The reader was stopped in between: everything arrived in order, but nobody vouches for it."""
    ends = {"num_prefill": 0, "num_decode": 2, "decode": {"prefill": "pull"}}
    async with running(redis_url, **ends) as cluster:
        owner, reader = cluster.decode
        expected = await answer(owner)
        await published(owner, to=reader)
        fetcher = reader.worker._desk._fetcher  # type: ignore[attr-defined]
        read, clock, late = fetcher._read, fetcher._clock, [0.0]

        async def stopped(*arguments: object) -> object:
            late[0] = 3600.0
            return await read(*arguments)

        patch.setattr(fetcher, "_clock", lambda: clock() + late[0])
        patch.setattr(fetcher, "_read", stopped)
        assert await answer(reader) == expected
        assert counted(reader, "pulls") == {"lease_over": 1}


Scenario = Callable[[str, pytest.MonkeyPatch], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Guard:
    """Where it is, what it looks like gone, and the scenario that misses it."""

    owner: object
    name: str
    gone: object
    scenario: Scenario


def passes(*_: object, **__: object) -> None:
    """A check that finds nothing."""


def held_without(name: str) -> property:
    """``PageRecord.held``, blind for one kind of hold."""
    others = {"owners", "leases", "num_readers", "num_writers"} - {name}
    return property(lambda record: any(getattr(record, other) for other in others))


GUARDS = {
    "digest": Guard(landing, "check_digest", passes, a_bit_that_flips_on_the_way_is_noticed),
    "identity in the digest": Guard(
        PageIdentity, "packed", lambda *_: b"", a_valid_page_of_another_prompt_is_noticed
    ),
    "generation": Guard(
        shm, "check_generation", passes, a_reference_to_a_slot_that_was_given_away_is_noticed
    ),
    "attempt": Guard(
        leases, "check_attempt", passes, a_late_release_of_an_old_attempt_frees_nothing
    ),
    "lease after the read": Guard(
        Fetcher, "_check_still_leased", passes, what_was_read_after_its_lease_is_not_used
    ),
    "reader count": Guard(
        PageRecord, "held", held_without("num_readers"), bytes_do_not_change_under_a_reader
    ),
    "writer count": Guard(
        PageRecord, "held", held_without("num_writers"), a_late_writer_writes_into_nobodys_page
    ),
    "commit": Guard(
        PageBook, "check_committed", passes, without_a_commit_no_token_comes_from_the_pages
    ),
    "tail": Guard(
        PageMemory,
        "clear_tail",
        passes,
        nothing_of_what_a_slot_held_before_leaves_with_a_page,
    ),
}


@pytest.mark.parametrize("name", GUARDS)
async def test_with_its_guard_the_scenario_passes(
    name: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await GUARDS[name].scenario(redis_url, monkeypatch)


@pytest.mark.parametrize("name", GUARDS)
async def test_without_its_guard_the_scenario_fails(
    name: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = GUARDS[name]
    monkeypatch.setattr(guard.owner, guard.name, guard.gone)
    with pytest.raises(AssertionError):
        await guard.scenario(redis_url, monkeypatch)
