"""Swap: room for pages, the choice between copying and computing, the scheduler's part."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.core import CoreSettings, EngineCore
from engine.generation import GenerateTask
from engine.model.load import LoadedModel, load_model
from engine.outputs import Output, Preempted, TokenOutput
from engine.plan import (
    Cancel,
    Event,
    Landed,
    Measured,
    Outcome,
    StepPlan,
    Submit,
)
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler, SchedulerLimits
from engine.sequence import Goal
from engine.swapping import Rates, SwapLedger, smoothed
from kvstore.pool import PagePool
from kvstore.prefix_hash import PrefixHasher
from kvstore.swap import FileRoom, MemoryRoom, Room, SwapError, SwapSpace, open_swap

PAGE = 16
BYTES = 64
NAME = b"n" * 16


# -- room


@pytest.fixture(params=["memory", "file"])
def room(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Room]:
    made = MemoryRoom(3, BYTES) if request.param == "memory" else FileRoom(tmp_path, 3, BYTES)
    yield made
    made.close()


def page_of(byte: int) -> memoryview:
    return memoryview(bytearray([byte]) * BYTES)


def test_a_page_comes_back_as_it_left(room: Room) -> None:
    space = SwapSpace(room)
    for slot in (2, 0, 1):
        assert space.store(slot, NAME, page_of(slot))
    for slot in range(3):
        target = page_of(9)
        assert space.load(slot, NAME, target)
        assert target == page_of(slot)


def test_a_page_is_not_taken_for_another_of_the_same_slot(room: Room) -> None:
    space = SwapSpace(room)
    space.store(0, NAME, page_of(1))
    assert not space.load(0, b"m" * 16, page_of(9))
    assert not space.load(1, NAME, page_of(9))
    space.store(0, b"m" * 16, page_of(1))
    assert not space.load(0, NAME, page_of(9))


def test_a_flipped_bit_is_noticed(room: Room) -> None:
    space = SwapSpace(room)
    space.store(1, NAME, page_of(0))
    damaged = page_of(0)
    damaged[17] = 4
    room.write(1, damaged)
    assert not space.load(1, NAME, page_of(9))


def test_a_file_that_was_cut_short_has_no_page(tmp_path: Path) -> None:
    room = FileRoom(tmp_path, 3, BYTES)
    space = SwapSpace(room)
    space.store(2, NAME, page_of(1))
    os.ftruncate(room._file.fileno(), 2 * BYTES + 7)
    assert not space.load(2, NAME, page_of(9))
    room.close()


def test_a_full_disk_keeps_no_page_and_raises_nothing(tmp_path: Path) -> None:
    with open("/dev/full", "r+b", buffering=0) as full:
        room = FileRoom(tmp_path, 3, BYTES)
        space = SwapSpace(room)
        own, room._file = room._file, full  # type: ignore[assignment]
        assert not space.store(0, NAME, page_of(1))
        assert not space.load(0, NAME, page_of(9))
        room._file = own
        room.close()


def test_room_that_cannot_be_had_is_refused_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SwapError, match="nowhere"):
        open_swap(1 << 20, tmp_path / "nowhere", BYTES)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SwapError, match="No space left"):
        open_swap(1 << 20, tmp_path, BYTES)
    assert open_swap(BYTES - 1, tmp_path, BYTES) is None


def test_the_file_has_no_name_that_could_stay_behind(tmp_path: Path) -> None:
    room = FileRoom(tmp_path, 3, BYTES)
    assert list(tmp_path.iterdir()) == []
    room.close()


# -- the choice


@pytest.mark.parametrize(
    ("prefill_s_per_token", "swap_s_per_page", "pays"),
    [
        (1e-3, 1e-3, True),
        (1e-3, 15.9e-3, True),
        (1e-3, 16e-3, False),
        (1e-6, 1e-3, False),
        (None, 1e-3, True),
        (1e-3, None, True),
    ],
)
def test_swapping_pays_where_a_page_is_copied_sooner_than_computed(
    prefill_s_per_token: float | None, swap_s_per_page: float | None, pays: bool
) -> None:
    assert Rates(prefill_s_per_token, swap_s_per_page).swap_pays(PAGE) is pays


def test_an_old_measurement_fades() -> None:
    assert smoothed(None, 4.0) == 4.0
    value = 4.0
    for _ in range(40):
        value = smoothed(value, 1.0)
    assert value == pytest.approx(1.0, rel=1e-3)


def test_the_swap_ledger_gives_what_is_left_and_takes_it_back() -> None:
    ledger = SwapLedger(5)
    assert ledger.hold("a", 3) == [0, 1, 2]
    assert ledger.hold("b", 3) == [3, 4]
    assert ledger.hold("c", 1) == []
    assert ledger.num_held == 5
    ledger.check()
    ledger.free("a")
    ledger.free("a")
    ledger.free("nobody")
    assert ledger.hold("c", 4) == [0, 1, 2]
    assert ledger.holders() == {"b": (3, 4), "c": (0, 1, 2)}
    ledger.check()


# -- the scheduler's part


class Driver:
    """A scheduler with room to swap; swapped pages come back intact up to ``intact`` of them."""

    def __init__(self, num_pages: int, num_swap_slots: int, intact: int = 99) -> None:
        pool = PagePool(num_pages, PAGE, clock=lambda: 0.0)
        limits = SchedulerLimits(max_sequences=8, max_step_tokens=64, chunk_tokens=32)
        self.scheduler = Scheduler(
            pool, limits, lambda tenant: PrefixHasher(tenant, bytes(16), PAGE), num_swap_slots
        )
        self.intact = intact
        self.lengths: dict[str, int] = {}
        self.plans: list[StepPlan] = []
        self._events: list[Event] = []

    def submit(self, name: str, num_prompt: int, num_output: int) -> Submit:
        self.lengths[name] = num_prompt + num_output
        return Submit(name, Goal.GENERATE, tuple(ord(name[0]) * 100 + i for i in range(num_prompt)))

    def step(self, *events: Event) -> StepPlan:
        pending, self._events = self._events, []
        plan = self.scheduler.plan([*pending, *events])
        self.plans.append(plan)
        for each in plan.swap_ins:
            num_pages = each.num_cached_pages + min(len(each.pages), self.intact)
            self._events.append(Landed(each.name, num_pages * PAGE))
        outcomes = {
            rows.name: Outcome(
                (7,) * rows.wants_logits,
                rows.start + len(rows.tokens) + 1 == self.lengths[rows.name],
            )
            for rows in plan.rows
        }
        self.scheduler.complete(plan, dict(outcomes))
        self.scheduler.check()
        return plan

    def run(self) -> None:
        for _ in range(500):
            if not self.scheduler.num_sequences:
                return
            self.step()
        raise AssertionError("sequences never end")

    def crowd(self) -> None:
        """Two that fit at first and not for long."""
        self.step(self.submit("old", 30, 60), self.submit("young", 46, 60))
        while not self.plans[-1].preempted:
            self.step()


def test_full_pages_of_a_preempted_sequence_are_swapped_out_and_come_back() -> None:
    driver = Driver(num_pages=7, num_swap_slots=8)
    driver.crowd()
    outs = driver.plans[-1].swap_outs
    assert driver.plans[-1].preempted == ("young",)
    assert len(outs) >= 2
    assert driver.scheduler.swap.num_held == len(outs)
    driver.run()
    ins = [each for plan in driver.plans for each in plan.swap_ins]
    assert [each.name for each in ins] == ["young"]
    back = {page.page_name: page.swap_slot for page in ins[0].pages}
    left = {page.page_name: page.swap_slot for page in outs}
    assert back.items() <= left.items()
    again = next(rows for plan in reversed(driver.plans) for rows in plan.rows)
    assert again.name == "young"
    assert driver.scheduler.swap.num_held == 0
    assert driver.scheduler.pool.num_available == 7


def test_what_is_swapped_in_is_not_computed_again() -> None:
    driver = Driver(num_pages=7, num_swap_slots=8)
    driver.crowd()
    driver.run()
    when, found = next(
        (number, plan.swap_ins[0]) for number, plan in enumerate(driver.plans) if plan.swap_ins
    )
    first = next(rows for plan in driver.plans[when:] for rows in plan.rows if rows.name == "young")
    assert first.start == (found.num_cached_pages + len(found.pages)) * PAGE


@pytest.mark.parametrize("intact", [0, 1])
def test_pages_that_are_not_intact_are_computed_again(intact: int) -> None:
    driver = Driver(num_pages=7, num_swap_slots=8, intact=intact)
    driver.crowd()
    driver.run()
    assert driver.scheduler.swap.num_held == 0
    assert driver.scheduler.pool.num_available == 7


def test_as_many_of_the_first_pages_are_swapped_as_there_is_room_for() -> None:
    driver = Driver(num_pages=7, num_swap_slots=1)
    driver.crowd()
    assert len(driver.plans[-1].swap_outs) == 1
    driver.run()


def test_nothing_is_swapped_where_it_does_not_pay() -> None:
    driver = Driver(num_pages=7, num_swap_slots=8)
    driver.step(Measured(Rates(prefill_s_per_token=1e-6, swap_s_per_page=1e-3)))
    driver.crowd()
    assert driver.plans[-1].preempted
    driver.run()
    assert not any(plan.swap_outs or plan.swap_ins for plan in driver.plans)


def test_a_cancelled_sequence_gives_its_swap_slots_back() -> None:
    driver = Driver(num_pages=7, num_swap_slots=8)
    driver.crowd()
    assert driver.scheduler.swap.num_held
    driver.step(Cancel("young"))
    assert driver.scheduler.swap.num_held == 0
    driver.run()


def test_a_sequence_cancelled_while_its_pages_come_back_loses_no_page() -> None:
    driver = Driver(num_pages=7, num_swap_slots=8)
    driver.crowd()
    while not driver.plans[-1].swap_ins:
        driver.step()
    driver.step(Cancel("young"))
    driver.run()
    driver.step()
    assert driver.scheduler.pool.num_available == 7
    assert driver.scheduler.swap.num_held == 0


# -- with a model


@pytest.fixture(scope="module")
def hash_model() -> LoadedModel:
    return load_model("hash")


def tokens_of(loaded: LoadedModel, num_pages: int, **swap: object) -> tuple[dict, EngineCore]:
    """What four sequences bring in a pool of that size, and the engine afterwards."""
    limits = SchedulerLimits(max_sequences=4, max_step_tokens=64, chunk_tokens=32)
    settings = CoreSettings(num_pages, PAGE, limits, check_pages=True, **swap)  # type: ignore[arg-type]
    core = EngineCore(loaded.model, loaded.tokenizer.token_bytes, settings, bytes(16))
    params = SamplingParams(temperature=0.7, seed=5, ignore_eos=True)
    core.submit(
        GenerateTask(f"s{n}", tuple(range(n + 1, n + 30)), params, 5, 70, n) for n in range(4)
    )
    outputs: list[Output] = []
    while core.step(outputs.extend) or core.scheduler.num_sequences:
        pass
    tokens: dict[str, list[int]] = {}
    for output in outputs:
        if isinstance(output, TokenOutput):
            tokens.setdefault(output.name, []).append(output.token_id)
    assert any(isinstance(output, Preempted) for output in outputs) == (num_pages < 28)
    assert core.pool.num_available == num_pages
    assert core.scheduler.swap.num_held == 0
    return tokens, core


@pytest.mark.parametrize("where", ["memory", "file"])
def test_swapped_sequences_bring_the_tokens_of_undisturbed_ones(
    hash_model: LoadedModel, where: str, tmp_path: Path
) -> None:
    undisturbed, _ = tokens_of(hash_model, 40)
    folder = tmp_path if where == "file" else None
    swapped, core = tokens_of(hash_model, 14, swap_bytes=1 << 20, swap_dir=folder)
    assert swapped == undisturbed
    assert core.totals.swapped_out > 0
    assert core.totals.swapped_in > 0
    assert core.totals.swap_lost == 0
    core.close()


def test_damaged_and_missing_swapped_pages_are_computed_again_to_the_same_tokens(
    hash_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, _ = tokens_of(hash_model, 40)
    read, calls = MemoryRoom.read, iter(range(1_000_000))

    def damaged(room: MemoryRoom, slot: int, target: memoryview) -> None:
        read(room, slot, target)
        number = next(calls)
        if number % 3 == 0:
            target[number % len(target)] ^= 1
        elif number % 3 == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(MemoryRoom, "read", damaged)
    swapped, core = tokens_of(hash_model, 14, swap_bytes=1 << 20)
    assert swapped == undisturbed
    assert core.totals.swap_lost > 0


def test_a_write_that_fails_is_a_page_to_compute_again(
    hash_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(room: MemoryRoom, slot: int, content: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MemoryRoom, "write", full)
    swapped, core = tokens_of(hash_model, 14, swap_bytes=1 << 20)
    assert swapped == tokens_of(hash_model, 40)[0]
    assert core.totals.swapped_out == 0
    assert core.totals.swap_lost > 0
