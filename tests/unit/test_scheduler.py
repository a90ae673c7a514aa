"""The scheduler as a pure function: who runs, who waits, who gives pages up."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from engine.plan import (
    Cancel,
    Event,
    Landed,
    Outcome,
    ReadsEnded,
    StepPlan,
    Submit,
)
from engine.scheduler import Scheduler, SchedulerLimits
from engine.sequence import Goal
from kvstore.ledger import PageState
from kvstore.pool import PagePool
from kvstore.prefix_hash import PrefixHasher

PAGE = 16


class Driver:
    """Runs a scheduler with a model that makes token 7 and ends sequences at a given length."""

    def __init__(self, num_pages: int, **limits: int) -> None:
        defaults = {"max_sequences": 8, "max_step_tokens": 64, "chunk_tokens": 32}
        self.pool = PagePool(num_pages, PAGE, clock=lambda: 0.0)
        self.scheduler = Scheduler(
            self.pool,
            SchedulerLimits(**(defaults | limits)),
            lambda tenant: PrefixHasher(tenant, bytes(16), PAGE),
        )
        self.lengths: dict[str, int] = {}
        self.output: defaultdict[str, list[int]] = defaultdict(list)
        self.history: list[tuple[tuple[Event, ...], StepPlan]] = []
        self.announced: list[tuple[str, int]] = []

    def submit(self, name: str, num_prompt: int, output: int, **extra: object) -> Submit:
        self.lengths[name] = output
        salt = sum(name.encode())
        extra.setdefault("prompt", tuple((salt + i) % 1000 for i in range(num_prompt)))
        return Submit(name, extra.pop("goal", Goal.GENERATE), **extra)  # type: ignore[arg-type]

    def step(self, *events: Event) -> StepPlan:
        plan = self.scheduler.plan(events)
        self.history.append((events, plan))
        outcomes: dict[str, Outcome | None] = {}
        for rows in plan.rows:
            assert rows.pages, "rows without pages"
            assert len(rows.pages) * PAGE >= rows.start + len(rows.tokens)
            if rows.wants_logits:
                self.output[rows.name].append(7)
                done = len(self.output[rows.name]) == self.lengths[rows.name]
                outcomes[rows.name] = Outcome((7,), done)
            else:
                outcomes[rows.name] = Outcome()
        self.scheduler.complete(plan, outcomes)
        pages = (*plan.finished_pages, *plan.coming_pages)
        self.announced += [(page.name, page.slot) for page in pages]
        self.pool.check()
        return plan

    def reads_ended(self) -> list[ReadsEnded]:
        """All pages announced so far were read."""
        announced, self.announced = self.announced, []
        return [ReadsEnded(name, (slot,)) for name, slot in announced]

    def run(self, *events: Event, steps: int = 500) -> None:
        self.step(*events)
        for _ in range(steps):
            if not self.scheduler.num_sequences:
                return
            self.step()
        raise AssertionError("sequences never end")


def test_sequences_join_and_leave_at_every_step() -> None:
    driver = Driver(32)
    driver.step(driver.submit("a", 4, 5))
    driver.step(driver.submit("b", 4, 2))
    plan = driver.step()
    assert [rows.name for rows in plan.rows] == ["a", "b"]
    plan = driver.step(driver.submit("c", 4, 1))
    assert [rows.name for rows in plan.rows] == ["a", "c"]


def test_a_long_prompt_runs_in_chunks_beside_decode_rows() -> None:
    driver = Driver(32, chunk_tokens=20)
    driver.step(driver.submit("a", 4, 50))
    plan = driver.step(driver.submit("b", 100, 1))
    assert [(rows.name, len(rows.tokens)) for rows in plan.rows] == [("a", 1), ("b", 20)]
    plan = driver.step()
    assert [(rows.name, rows.start, len(rows.tokens)) for rows in plan.rows] == [
        ("a", 5, 1),
        ("b", 20, 20),
    ]


def test_decode_rows_go_before_prompt_rows_when_the_budget_is_short() -> None:
    driver = Driver(64, max_step_tokens=8, max_sequences=8)
    driver.step(driver.submit("long", 200, 1))
    driver.step(driver.submit("a", 1, 50))
    for _ in range(3):
        plan = driver.step()
    assert {rows.name: len(rows.tokens) for rows in plan.rows} == {"a": 1, "long": 7}


def test_prompts_get_fewer_rows_while_a_sequence_waits_for_its_next_token() -> None:
    driver = Driver(64, chunk_tokens=64, mixed_prompt_tokens=10)
    plan = driver.step(driver.submit("a", 50, 2), driver.submit("b", 200, 1))
    assert {rows.name: len(rows.tokens) for rows in plan.rows} == {"a": 32, "b": 32}
    plan = driver.step(driver.submit("c", 200, 1))
    assert {rows.name: len(rows.tokens) for rows in plan.rows} == {"a": 18, "b": 23, "c": 23}
    plan = driver.step()
    assert {rows.name: len(rows.tokens) for rows in plan.rows} == {"a": 1, "b": 5, "c": 5}
    plan = driver.step()
    assert {rows.name: len(rows.tokens) for rows in plan.rows} == {"b": 32, "c": 32}


def test_a_prompt_to_be_handed_over_ends_with_a_short_chunk() -> None:
    driver = Driver(64, max_step_tokens=512, chunk_tokens=512)
    lengths = []
    plan = driver.step(driver.submit("a", 901, 1, goal=Goal.PREFILL))
    while plan.rows:
        lengths.append(len(plan.rows[0].tokens))
        plan = driver.step()
    assert lengths == [512, 260, 128]


def test_only_the_last_row_of_a_known_text_wants_logits() -> None:
    driver = Driver(32, chunk_tokens=10)
    first = driver.step(driver.submit("a", 15, 3))
    assert not first.rows[0].wants_logits
    second = driver.step()
    assert second.rows[0].wants_logits
    assert second.rows[0].tokens[-1] == (sum(b"a") + 14) % 1000


def test_waiting_sequences_get_all_their_pages_or_none() -> None:
    driver = Driver(4)
    driver.step(driver.submit("a", 40, 20))
    plan = driver.step(driver.submit("b", 40, 1))
    assert [rows.name for rows in plan.rows] == ["a"]
    assert driver.pool.num_available == 1
    driver.run()
    assert len(driver.output["b"]) == 1


def test_the_youngest_gives_its_pages_up_and_gets_the_same_tokens_later() -> None:
    driver = Driver(6, max_sequences=2)
    driver.step(driver.submit("old", 30, 40), driver.submit("young", 30, 30))
    preempted: list[str] = []
    while driver.scheduler.num_sequences:
        preempted += driver.step().preempted
    assert set(preempted) == {"young"}
    assert (len(driver.output["old"]), len(driver.output["young"])) == (40, 30)
    assert driver.pool.ledger.num_free + driver.pool.num_idle == 6


def test_a_prefix_in_the_cache_is_not_computed_again() -> None:
    driver = Driver(32)
    prompt = tuple(range(40))
    driver.run(driver.submit("a", 0, 1, prompt=prompt))
    plan = driver.step(driver.submit("b", 0, 1, prompt=prompt))
    assert plan.admissions[0].cached_tokens == 32
    assert (plan.rows[0].start, len(plan.rows[0].tokens)) == (32, 8)


def test_the_last_token_is_always_computed_even_if_every_page_is_cached() -> None:
    driver = Driver(32)
    prompt = tuple(range(32))
    driver.run(driver.submit("a", 0, 17, prompt=prompt))
    plan = driver.step(driver.submit("b", 0, 1, prompt=prompt))
    assert plan.admissions[0].cached_tokens == 16
    assert plan.rows[0].wants_logits


def test_tenants_do_not_share_pages() -> None:
    driver = Driver(32)
    prompt = tuple(range(40))
    driver.run(driver.submit("a", 0, 1, prompt=prompt, tenant="one"))
    plan = driver.step(driver.submit("b", 0, 1, prompt=prompt, tenant="two"))
    assert plan.admissions[0].cached_tokens == 0


def test_choices_wait_for_the_first_one_and_share_its_prompt_pages() -> None:
    driver = Driver(32)
    prompt = tuple(range(40))
    driver.step(
        driver.submit("r/0", 0, 3, prompt=prompt),
        driver.submit("r/1", 0, 3, prompt=prompt, after="r/0"),
        driver.submit("r/2", 0, 3, prompt=prompt, after="r/0"),
    )
    plan = driver.step()
    followers = [rows for rows in plan.rows if rows.name != "r/0"]
    if not followers:
        plan = driver.step()
        followers = [rows for rows in plan.rows if rows.name != "r/0"]
    assert [(rows.name, rows.start) for rows in followers] == [("r/1", 32), ("r/2", 32)]
    assert followers[0].pages[:2] == followers[1].pages[:2]
    assert followers[0].pages[2] != followers[1].pages[2]
    driver.run()
    assert [len(driver.output[f"r/{i}"]) for i in range(3)] == [3, 3, 3]


def test_choices_go_on_when_the_first_one_is_cancelled() -> None:
    driver = Driver(32)
    prompt = tuple(range(100))
    driver.step(
        driver.submit("r/0", 0, 3, prompt=prompt),
        driver.submit("r/1", 0, 3, prompt=prompt, after="r/0"),
    )
    driver.run(Cancel("r/0"))
    assert len(driver.output["r/1"]) == 3


def test_a_prefill_sequence_announces_every_page_and_leaves_leases() -> None:
    driver = Driver(8)
    driver.run(driver.submit("p", 41, 0, goal=Goal.PREFILL))
    assert len(driver.announced) == 3
    assert driver.pool.num_available == 5
    driver.step(*driver.reads_ended())
    assert driver.pool.num_available == 5
    driver.step(Cancel("p"))
    assert driver.pool.num_available == 8


def test_a_prefill_sequence_with_a_cached_prompt_announces_the_cached_pages() -> None:
    driver = Driver(8)
    prompt = tuple(range(33))
    driver.run(driver.submit("p", 0, 0, prompt=prompt, goal=Goal.PREFILL))
    first = [slot for _, slot in driver.announced]
    plan = driver.step(driver.submit("q", 0, 0, prompt=prompt, goal=Goal.PREFILL))
    assert [page.slot for page in plan.finished_pages] == first
    assert plan.prefilled == ("q",)
    driver.step(*driver.reads_ended(), Cancel("p"), Cancel("q"))
    assert driver.pool.num_available == 8


def test_a_step_says_beforehand_which_pages_it_will_finish_and_their_names() -> None:
    driver = Driver(8, chunk_tokens=24)
    plans = [
        driver.step(driver.submit("p", 59, 0, goal=Goal.PREFILL)),
        driver.step(),
        driver.step(),
    ]
    coming = [[(page.page_index, page.num_tokens) for page in plan.coming_pages] for plan in plans]
    assert coming == [[(0, PAGE)], [(1, PAGE), (2, PAGE)], [(3, 10)]]
    hasher = PrefixHasher("", bytes(16), PAGE)
    prompt = driver.history[0][0][0].prompt[:58]  # type: ignore[union-attr]
    names = [page.prefix_hash for plan in plans for page in plan.coming_pages]
    assert names == hasher.all_pages(prompt)
    for page in (page for plan in plans for page in plan.coming_pages):
        record = driver.pool.ledger[page.slot]
        assert (record.prefix_hash, record.num_tokens) == (page.prefix_hash, page.num_tokens)
        assert record.num_readers == 1


def test_pages_of_a_step_that_failed_are_withheld_until_their_export_let_go() -> None:
    driver = Driver(8, chunk_tokens=32)
    plan = driver.scheduler.plan([driver.submit("p", 40, 0, goal=Goal.PREFILL)])
    slots = tuple(page.slot for page in plan.coming_pages)
    driver.scheduler.complete(plan, {"p": None})
    assert {driver.pool.ledger[slot].state for slot in slots} == {PageState.QUARANTINED}
    driver.scheduler.plan([ReadsEnded("p", slots)])
    assert driver.pool.num_available == 8
    driver.pool.check()


def test_a_prompt_of_one_token_needs_no_page_from_prefill() -> None:
    driver = Driver(4)
    plan = driver.step(driver.submit("p", 1, 0, goal=Goal.PREFILL))
    assert plan.prefilled == ("p",)
    assert driver.pool.num_available == 4


def test_a_remote_sequence_is_reserved_until_its_pages_land() -> None:
    driver = Driver(8, min_remote_tokens=16)
    plan = driver.step(driver.submit("a", 41, 2, remote=True))
    (reservation,) = plan.reservations
    assert (len(reservation.slots), reservation.num_tokens) == (3, 40)
    assert not plan.rows
    assert not driver.step().rows
    plan = driver.step(Landed("a", 40))
    assert [(rows.start, len(rows.tokens), rows.wants_logits) for rows in plan.rows] == [
        (40, 1, True)
    ]
    driver.run()
    assert driver.pool.num_available == 8


def test_a_failed_handover_is_computed_here_in_the_same_pages() -> None:
    driver = Driver(8, min_remote_tokens=16)
    (reservation,) = driver.step(driver.submit("a", 41, 2, remote=True)).reservations
    plan = driver.step(Landed("a", 0))
    assert plan.rows[0].start == 0
    assert plan.rows[0].pages[0] == reservation.slots[0]
    driver.run()
    assert len(driver.output["a"]) == 2


def test_a_short_rest_is_prefilled_here() -> None:
    driver = Driver(8, min_remote_tokens=41)
    plan = driver.step(driver.submit("a", 41, 2, remote=True))
    assert not plan.reservations
    assert plan.rows


def test_pages_of_a_cancelled_reservation_wait_for_its_writer() -> None:
    driver = Driver(3, min_remote_tokens=16)
    driver.step(driver.submit("a", 41, 2, remote=True))
    driver.step(Cancel("a"))
    assert driver.pool.num_available == 0
    driver.step(Landed("a", 0))
    assert driver.pool.num_available == 3


def test_a_landing_told_twice_joins_once() -> None:
    driver = Driver(8, min_remote_tokens=16)
    driver.step(driver.submit("a", 41, 2, remote=True))
    plan = driver.step(Landed("a", 40), Landed("a", 40))
    assert [rows.name for rows in plan.rows] == ["a"]
    driver.run(Landed("a", 40))
    assert len(driver.output["a"]) == 2


def test_pages_of_foreign_numbers_are_shared_by_their_choices_and_by_nobody_else() -> None:
    driver = Driver(32, min_remote_tokens=16)
    prompt = tuple(range(41))
    driver.step(
        driver.submit("r/0", 0, 2, prompt=prompt, remote=True),
        driver.submit("r/1", 0, 2, prompt=prompt, after="r/0"),
    )
    plan = driver.step(Landed("r/0", 40, foreign=b"f" * 16))
    assert [(each.name, each.cached_tokens) for each in plan.admissions] == [("r/1", 32)]
    driver.run()
    plan = driver.step(driver.submit("next", 0, 1, prompt=prompt))
    assert plan.admissions[0].cached_tokens == 0
    driver.run()
    plan = driver.step(driver.submit("last", 0, 1, prompt=prompt))
    assert plan.admissions[0].cached_tokens == 32


def test_a_landing_after_the_cancel_frees_the_pages() -> None:
    driver = Driver(3, min_remote_tokens=16)
    driver.step(driver.submit("a", 41, 2, remote=True))
    plan = driver.step(Cancel("a"), Landed("a", 40))
    assert not plan.rows
    assert driver.pool.num_available == 3


def test_a_page_violation_ends_one_sequence_and_not_the_others() -> None:
    driver = Driver(8)
    driver.step(driver.submit("good", 20, 30), driver.submit("bad", 20, 30))
    stolen = driver.scheduler.sequence("bad").pages[1]  # type: ignore[union-attr]
    driver.pool.ledger.seal(stolen, b"x" * 16, 4)
    faults = []
    for _ in range(40):
        plan = driver.scheduler.plan([])
        effects = driver.scheduler.complete(plan, {r.name: Outcome((7,)) for r in plan.rows})
        faults += [*plan.faults, *effects.faults]
        driver.pool.ledger.check()
        if len(faults) or not plan.rows:
            break
    assert [fault.name for fault in faults] == ["bad"]
    assert driver.scheduler.sequence("good") is not None


@pytest.mark.parametrize("seed", range(40))
def test_any_mix_of_events_ends_with_a_full_pool_and_replays_to_the_same_plans(seed: int) -> None:
    rng = random.Random(seed)
    limits = {
        "max_sequences": rng.randint(1, 6),
        "max_step_tokens": rng.randint(6, 64),
        "chunk_tokens": rng.randint(1, 40),
        "min_remote_tokens": rng.choice([1, 20]),
    }
    num_pages = rng.randint(8, 20)
    driver = Driver(num_pages, **limits)
    flying: list[tuple[str, int]] = []
    for number in range(25):
        events: list[Event] = []
        goal = rng.choice([Goal.GENERATE, Goal.GENERATE, Goal.PREFILL])
        name = f"s{number}"
        prompt = tuple(range(rng.randint(1, 100)))
        remote = goal is Goal.GENERATE and rng.random() < 0.4
        events.append(
            driver.submit(name, 0, rng.randint(1, 20), prompt=prompt, goal=goal, remote=remote)
        )
        if rng.random() < 0.3:
            events.append(Cancel(f"s{rng.randint(0, number)}"))
        events += driver.reads_ended()
        while flying and rng.random() < 0.7:
            landed, num_tokens = flying.pop(0)
            events.append(Landed(landed, rng.choice([0, num_tokens])))
        plan = driver.step(*events)
        flying += [(r.name, r.num_tokens) for r in plan.reservations]
        for _ in range(rng.randint(0, 6)):
            flying += [(r.name, r.num_tokens) for r in driver.step().reservations]
    for _ in range(3000):
        events = [Landed(name, num_tokens) for name, num_tokens in flying]
        events += driver.reads_ended()
        plan = driver.step(*events)
        flying = [(r.name, r.num_tokens) for r in plan.reservations]
        if not driver.scheduler.num_sequences:
            break
    driver.step(*driver.reads_ended(), *[Cancel(f"s{number}") for number in range(25)])
    assert driver.scheduler.num_sequences == 0
    driver.pool.clear_cache()
    assert driver.pool.ledger.num_free == num_pages

    replay = Driver(num_pages, **limits)
    replay.lengths = driver.lengths
    for events_then, plan_then in driver.history:
        assert replay.step(*events_then) == plan_then
