"""Which prefill workers a decode service knows, and which of them it chooses."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest

from decode_svc.choose import choose_prefill
from decode_svc.reader import Reader
from decode_svc.workers import AVOID_S, KEEP_S, LOOK_AGAIN_S, KnownWorkers
from kvstore.fingerprint import LayoutFingerprint
from kvstore.index import IndexUnavailable, WorkerLoad, WorkerRecord, WorkerRole
from kvstore.index.memory import MemoryPageIndex

LAYOUT = LayoutFingerprint(
    model_digest="00" * 16,
    numerics="int8/bf16/1",
    num_layers=30,
    num_kv_heads=3,
    head_dim=64,
    page_size=32,
    kv_dtype="bf16",
    layout_id="k16t_vtd",
)
OURS = Reader(LAYOUT)


def worker(
    name: str, queued: int = 0, running: int = 0, layout: LayoutFingerprint = LAYOUT
) -> WorkerRecord:
    load = WorkerLoad(running, 0, queued, 10, 10)
    return WorkerRecord(
        boot_id=name * 32,
        role="prefill",
        endpoint=f"127.0.0.1:{ord(name)}",
        fingerprint=layout.digest.hex(),
        model="m",
        load=load,
        state="serving",
        layout=layout,
    )


class Index(MemoryPageIndex):
    """Lists what a test says, or nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.listed: list[WorkerRecord] | None = []

    async def workers(self, role: WorkerRole | None = None) -> list[WorkerRecord]:
        if self.listed is None:
            raise IndexUnavailable("away")
        return self.listed


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_least_loaded_worker_of_equal_fingerprint_is_chosen() -> None:
    idle, busy = worker("a", queued=5), worker("b", queued=50)
    assert choose_prefill([busy, idle], OURS, ()) == idle
    assert choose_prefill([busy, idle], OURS, {idle.boot_id}) == busy
    assert choose_prefill([], OURS, ()) is None


def test_a_worker_of_other_pages_is_chosen_where_they_can_be_converted() -> None:
    """Foreign numbers only if allowed, and then only where there are no others."""
    other_size = worker("a", queued=50, layout=replace(LAYOUT, page_size=64))
    foreign = worker("b", layout=replace(LAYOUT, kv_dtype="fp32", numerics="int8/fp32/1"))
    other_model = worker("c", layout=replace(LAYOUT, model_digest="11" * 16))
    untold = replace(worker("d", layout=replace(LAYOUT, page_size=16)), layout=None)
    everyone = [other_size, foreign, other_model, untold]
    assert choose_prefill(everyone, OURS, ()) == other_size
    assert choose_prefill([foreign, other_model, untold], OURS, ()) is None
    lenient = replace(OURS, allow_foreign=True)
    assert choose_prefill(everyone, lenient, ()) == other_size
    assert choose_prefill([foreign, other_model, untold], lenient, ()) == foreign
    assert choose_prefill([other_model, untold], lenient, ()) is None


@pytest.mark.parametrize("change", [{"role": "decode"}, {"state": "draining"}])
def test_other_roles_and_draining_workers_are_not_chosen(change: dict[str, str]) -> None:
    assert choose_prefill([replace(worker("a"), **change)], OURS, ()) is None  # type: ignore[arg-type]


async def test_a_silent_index_leaves_the_last_list_in_use_for_good() -> None:
    index, clock = Index(), Clock()
    workers = KnownWorkers(index, OURS, clock)
    index.listed = [worker("a")]
    await workers.refresh()
    index.listed = None
    clock.now = 1000 * KEEP_S
    await workers.refresh()
    assert workers.choose() == worker("a")


async def test_a_worker_that_registered_since_the_last_look_is_found() -> None:
    index = Index()
    workers = KnownWorkers(index, OURS, Clock())
    await workers.refresh()
    assert await workers.find() is None
    index.listed = [worker("a")]
    assert workers.choose() is None
    assert await workers.find() == worker("a")


async def test_while_a_worker_is_known_finding_one_asks_the_index_nothing() -> None:
    index = Index()
    workers = KnownWorkers(index, OURS, Clock())
    index.listed = [worker("a")]
    await workers.refresh()
    index.listed = [worker("b")]
    assert await workers.find() == worker("a")


async def test_a_holder_that_registered_since_the_last_look_is_found() -> None:
    """The index names its pages within milliseconds; the list of workers is read each second."""
    index, clock = Index(), Clock()
    workers = KnownWorkers(index, OURS, clock)
    await workers.refresh()
    index.listed = [worker("a")]
    held = {worker("a").boot_id: 3}
    assert await workers.holder(held) is None  # it has just looked
    clock.now += LOOK_AGAIN_S
    found = await workers.holder(held)
    assert found is not None
    assert found.boot_id == worker("a").boot_id
    index.listed = []
    clock.now += LOOK_AGAIN_S
    assert await workers.holder(held) == found  # known: nobody was asked


async def test_an_index_restarted_empty_is_not_believed_at_once() -> None:
    index, clock = Index(), Clock()
    workers = KnownWorkers(index, OURS, clock)
    index.listed = [worker("a")]
    await workers.refresh()
    index.listed = []
    await workers.refresh()
    assert workers.choose() == worker("a")
    clock.now = KEEP_S + 1
    await workers.refresh()
    assert workers.choose() is None


async def test_an_index_that_was_gone_for_long_and_is_empty_now_is_not_believed_at_once() -> None:
    """Its workers register again with their next heartbeat."""
    index, clock = Index(), Clock()
    workers = KnownWorkers(index, OURS, clock)
    index.listed = [worker("a")]
    await workers.refresh()
    index.listed = None
    clock.now = 2 * KEEP_S
    await workers.refresh()
    index.listed = []
    for clock.now, known in (
        (3 * KEEP_S, worker("a")),
        (4 * KEEP_S - 1, worker("a")),
        (4 * KEEP_S + 1, None),
    ):
        await workers.refresh()
        assert workers.choose() == known


async def test_a_worker_that_failed_is_left_alone_for_a_while() -> None:
    index, clock = Index(), Clock()
    workers = KnownWorkers(index, OURS, clock)
    index.listed = [worker("a"), worker("b", queued=9)]
    await workers.refresh()
    workers.failed(worker("a"))
    assert workers.choose() == worker("b", queued=9)
    clock.now = AVOID_S + 1
    assert workers.choose() == worker("a")


async def test_prompts_that_come_at_once_do_not_all_go_to_the_worker_that_was_idle() -> None:
    index = Index()
    workers = KnownWorkers(index, OURS, Clock())
    index.listed = [worker("a"), worker("b", queued=99)]
    await workers.refresh()
    with workers.sending(worker("a"), 60):
        assert workers.choose() == worker("a", queued=60)
        with workers.sending(worker("a"), 60):
            assert workers.choose() == worker("b", queued=99)
    assert workers.choose() == worker("a")


async def test_a_worker_whose_endpoint_another_one_has_taken_is_forgotten_at_once() -> None:
    index = Index()
    workers = KnownWorkers(index, OURS, Clock())
    dead, bystander = worker("a"), worker("c", queued=9)
    heir = replace(worker("b", queued=5), endpoint=dead.endpoint)
    index.listed = [dead, bystander]
    await workers.refresh()
    index.listed = [heir]
    await workers.refresh()
    assert workers.choose() == heir
    workers.failed(heir)
    assert workers.choose() == bystander


async def test_a_worker_restarted_at_its_endpoint_gets_a_channel_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []

    class Opened:
        """A peer that is there."""

        def __init__(self, worker: WorkerRecord, channel: grpc.aio.Channel) -> None:
            opened.append(worker.boot_id)
            self._channel = channel

        async def channel(self, timeout_s: float) -> grpc.aio.Channel:
            return self._channel

        async def close(self) -> None:
            await self._channel.close()

    monkeypatch.setattr("decode_svc.workers.Peer", Opened)
    index = Index()
    workers = KnownWorkers(index, OURS, Clock())
    dead = worker("a")
    heir = replace(worker("b"), endpoint=dead.endpoint)
    index.listed = [dead]
    await workers.refresh()
    old = await workers.channel(dead, 1.0)
    index.listed = [heir]
    await workers.refresh()
    new = await workers.channel(heir, 1.0)
    assert new is not old
    await workers.refresh()
    assert await workers.channel(heir, 1.0) is new
    assert opened == [dead.boot_id, heir.boot_id]
    await workers.close()


async def test_what_speaks_against_each_worker_is_told() -> None:
    index = Index()
    workers = KnownWorkers(index, OURS, Clock())
    assert workers.standing() == "none known"
    strange = worker("c", layout=replace(LAYOUT, head_dim=128))
    index.listed = [worker("a"), replace(worker("b"), state="draining"), strange]
    await workers.refresh()
    workers.failed(worker("a"))
    assert workers.choose() is None
    told = ["97 failed lately", "98 draining", "99 incompatible fingerprint"]
    assert workers.standing() == ", ".join(f"127.0.0.1:{each}" for each in told)
