"""Cached pages lent to other workers, as the scheduler decides it."""

from __future__ import annotations

import pytest

from engine.lending import Grant, Lend
from engine.plan import Cancel, Outcome, StepPlan, Submit
from engine.scheduler import Scheduler, SchedulerLimits
from engine.sequence import Goal
from kvstore.ledger import PageState
from kvstore.pool import PagePool
from kvstore.prefix_hash import PrefixHasher

PAGE = 16
PROMPT = tuple(range(4 * PAGE + 1))
HASHER = PrefixHasher("", bytes(16), PAGE)
NAMES = tuple(HASHER.full_pages(PROMPT))
NUM_PAGES = 8


class Node:
    """A scheduler whose model makes token 7, over a pool that keeps the four pages of PROMPT."""

    def __init__(self) -> None:
        self.pool = PagePool(NUM_PAGES, PAGE, clock=lambda: 0.0)
        limits = SchedulerLimits(max_sequences=8, max_step_tokens=256, chunk_tokens=128)
        self.scheduler = Scheduler(self.pool, limits, lambda tenant: HASHER)
        self.submit("first", PROMPT)
        self.step(Cancel("first"))
        assert self.pool.num_idle == 4

    def submit(self, name: str, prompt: tuple[int, ...]) -> StepPlan:
        return self.step(Submit(name, Goal.GENERATE, prompt))

    def step(self, *events: object) -> StepPlan:
        plan = self.scheduler.plan(events)  # type: ignore[arg-type]
        outcomes = {rows.name: Outcome((7,) * rows.wants_logits) for rows in plan.rows}
        self.scheduler.complete(plan, outcomes)
        self.pool.check()
        return plan

    def lend(self, *events: object) -> Grant:
        (grant,) = self.step(*events, Lend("reader", NAMES)).grants
        return grant

    def refused(self) -> bool:
        """Whether a lease protects the cached pages from a sequence that needs them all."""
        plan = self.submit("greedy", tuple(range(1000, 1000 + NUM_PAGES * PAGE)))
        return not plan.admissions


@pytest.fixture
def node() -> Node:
    return Node()


def test_the_pages_asked_for_are_lent_in_order(node: Node) -> None:
    grant = node.lend()
    assert grant.refusal == ""
    assert tuple(page.prefix_hash for page in grant.pages) == NAMES
    assert [page.page_index for page in grant.pages] == [0, 1, 2, 3]
    assert all(node.pool.ledger[page.slot].leases == {"reader"} for page in grant.pages)


def test_pages_are_lent_up_to_the_first_that_is_not_here(node: Node) -> None:
    names = (*NAMES[1:3], bytes(16), NAMES[3])
    (grant,) = node.step(Lend("reader", names, first_page=1)).grants
    assert [page.page_index for page in grant.pages] == [1, 2]
    assert grant.refusal == "absent"


def test_a_lent_page_is_not_evicted_before_the_lease_ends(node: Node) -> None:
    node.lend()
    assert node.refused()
    assert node.step(Cancel("reader")).admissions
    assert node.pool.ledger.count(PageState.FREE) == 0


def test_what_the_first_in_the_queue_waits_for_is_not_lent(node: Node) -> None:
    node.submit("long", tuple(range(2000, 2000 + 5 * PAGE)))
    assert node.pool.num_available == NUM_PAGES - 5
    node.submit("waits", tuple(range(3000, 3000 + 4 * PAGE)))
    grant = node.lend()
    assert grant.pages == ()
    assert grant.refusal == "busy"


def test_a_page_stays_for_each_running_sequence(node: Node) -> None:
    node.submit("long", tuple(range(2000, 2000 + 5 * PAGE - 1)))
    grant = node.lend()
    assert len(grant.pages) == NUM_PAGES - 5 - 1
    assert grant.refusal == "busy"


def test_a_page_that_a_sequence_owns_is_lent_whatever_the_room(node: Node) -> None:
    node.submit("owner", PROMPT)
    assert node.lend().refusal == ""


def test_a_lease_given_up_before_it_was_granted_leaves_nothing(node: Node) -> None:
    plan = node.step(Lend("reader", NAMES), Cancel("reader"))
    assert plan.grants == ()
    assert node.pool.num_idle == 4


def test_two_readers_have_leases_of_their_own(node: Node) -> None:
    plan = node.step(Lend("one", NAMES), Lend("two", NAMES))
    assert [len(grant.pages) for grant in plan.grants] == [4, 4]
    node.step(Cancel("one"))
    assert node.refused()
    node.step(Cancel("two"), Cancel("two"))
    assert node.scheduler.num_waiting == 0


def test_a_page_in_a_wrong_state_ends_the_lease_concerned_and_nothing_else(node: Node) -> None:
    (slot,) = node.pool.match(NAMES[:1])
    node.pool.hold([slot], "reader")
    plan = node.step(Lend("reader", NAMES), Lend("other", NAMES[1:]))
    assert [fault.name for fault in plan.faults] == ["reader"]
    assert [len(grant.pages) for grant in plan.grants] == [3]
