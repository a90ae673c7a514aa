"""What a scheduler makes of drafts."""

from __future__ import annotations

from engine.plan import Drafted, Outcome, StepPlan, Submit
from engine.scheduler import Scheduler, SchedulerLimits
from engine.sequence import Goal
from kvstore.pool import PagePool
from kvstore.prefix_hash import PrefixHasher

PAGE = 16


class Driver:
    """A scheduler whose model counts upwards: after token ``t`` comes ``t + 1``."""

    def __init__(self, num_pages: int, **limits: int) -> None:
        self.pool = PagePool(num_pages, PAGE, clock=lambda: 0.0)
        self.scheduler = Scheduler(
            self.pool,
            SchedulerLimits(**({"max_sequences": 4, "max_step_tokens": 64} | limits)),
            lambda tenant: PrefixHasher(tenant, bytes(16), PAGE),
        )

    def step(self, *events: Submit | Drafted) -> StepPlan:
        plan = self.scheduler.plan(events)
        outcomes: dict[str, Outcome | None] = {}
        for rows in plan.rows:
            assert len(rows.pages) * PAGE >= rows.start + len(rows.tokens)
            if not rows.wants_logits:
                outcomes[rows.name] = Outcome()
                continue
            last = rows.tokens[-1 - rows.num_drafts]
            right = [last + 1]
            for draft in rows.drafts:
                if draft != right[-1]:
                    break
                right.append(draft + 1)
            outcomes[rows.name] = Outcome(tuple(right))
        self.scheduler.complete(plan, outcomes)
        self.scheduler.check()
        return plan

    def tokens(self, name: str = "a") -> list[int]:
        sequence = self.scheduler.sequence(name)
        assert sequence is not None
        assert sequence.num_computed == len(sequence.tokens) - 1
        used, needed = map(self.pool.pages_for, (sequence.num_computed, len(sequence.tokens)))
        assert used <= len(sequence.pages) <= needed
        return sequence.tokens

    def start(self, num_prompt: int, name: str = "a") -> None:
        self.step(Submit(name, Goal.GENERATE, tuple(range(num_prompt))))


def test_right_drafts_are_tokens_and_wrong_ones_leave_no_trace() -> None:
    driver = Driver(num_pages=8)
    driver.start(10)
    plan = driver.step(Drafted("a", (11, 12, 99, 14)))
    assert plan.rows[0].tokens == (10, 11, 12, 99, 14)
    assert (plan.rows[0].num_drafts, plan.rows[0].num_logits) == (4, 5)
    assert driver.tokens() == list(range(14))
    driver.step()
    assert driver.tokens() == list(range(15))


def test_pages_are_sealed_under_the_tokens_that_were_accepted() -> None:
    one, other = Driver(num_pages=8), Driver(num_pages=8)
    one.start(10)
    one.step(Drafted("a", (11, 12, 13, 77, 15, 16, 17, 18)))
    one.step(Drafted("a", tuple(range(15, 25))))
    other.start(10)
    while len(other.tokens()) < len(one.tokens()):
        other.step()
    first, second = (each.scheduler.sequence("a") for each in (one, other))
    assert first is not None
    assert second is not None
    assert first.tokens == second.tokens
    assert first.page_names == second.page_names
    assert len(first.page_names) == 1


def test_pages_that_only_rejected_drafts_needed_are_given_back() -> None:
    driver = Driver(num_pages=8)
    driver.start(14)
    plan = driver.step(Drafted("a", (0,) * 15))
    assert len(plan.rows[0].pages) == 2
    assert len(driver.tokens()) == 16
    assert driver.pool.num_available == 7


def test_drafts_take_no_page_that_others_will_need() -> None:
    driver = Driver(num_pages=3)
    driver.start(15, "a")
    driver.start(15, "b")  # "a" begins its second page, the last one
    plan = driver.step(Drafted("a", (17, 18, 19)), Drafted("b", (16, 17)))
    assert {rows.name: rows.num_drafts for rows in plan.rows} == {"a": 3, "b": 0}
    assert not plan.preempted
    assert driver.pool.num_available == 0


def test_a_page_is_left_for_everyone_who_runs() -> None:
    driver = Driver(num_pages=4)
    driver.start(14, "a")
    driver.start(4, "b")
    plan = driver.step(Drafted("a", (16, 17, 18)))  # of two pages left, one would be taken
    assert {rows.name: rows.num_drafts for rows in plan.rows} == {"a": 0, "b": 0}


def test_drafts_are_cut_to_the_rows_that_are_left_in_a_step() -> None:
    driver = Driver(num_pages=8, max_sequences=2, max_step_tokens=6)
    for name in "ab":
        driver.start(4, name)
    driver.step()
    last = len(driver.tokens("a")) - 1
    drafts = tuple(range(last + 1, last + 9))
    plan = driver.step(Drafted("a", drafts), Drafted("b", drafts))
    assert sum(len(rows.tokens) for rows in plan.rows) == 6
    assert [rows.num_drafts for rows in plan.rows] == [4, 0]


def test_drafts_count_for_one_step_and_for_sequences_that_decode() -> None:
    driver = Driver(num_pages=8, chunk_tokens=8)
    plan = driver.step(
        Submit("a", Goal.GENERATE, tuple(range(20))), Drafted("a", (20,)), Drafted("nobody", (1,))
    )
    assert [rows.num_drafts for rows in plan.rows] == [0]
    assert [rows.num_drafts for rows in driver.step().rows] == [0]
    assert driver.step().rows[0].tokens == (16, 17, 18, 19)
