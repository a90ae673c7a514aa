"""Whose cache is read, and who computes a prompt with the least to do."""

from __future__ import annotations

from dataclasses import replace

from decode_svc.choose import SEQUENCE_TOKENS, choose_holder, choose_prefill, held_runs
from decode_svc.reader import Reader
from kvstore.fingerprint import LayoutFingerprint
from kvstore.index import WorkerLoad, WorkerRecord

LAYOUT = LayoutFingerprint("00" * 16, "int8/bf16/1", 30, 3, 64, 32, "bf16", "k16t_vtd")
OTHER = replace(LAYOUT, page_size=64)
OURS = Reader(LAYOUT)


def worker(name: str, queued: int = 0, running: int = 0, role: str = "prefill") -> WorkerRecord:
    return WorkerRecord(
        boot_id=name * 32,
        role=role,  # type: ignore[arg-type]
        endpoint=f"127.0.0.1:{ord(name)}",
        fingerprint=LAYOUT.digest.hex(),
        model="m",
        load=WorkerLoad(running, 0, queued, 10, 10),
        state="serving",
        layout=LAYOUT,
    )


def test_a_worker_that_has_the_prefix_may_have_a_longer_queue() -> None:
    warm, idle = worker("b", queued=300), worker("a")
    hits = {warm.boot_id: 400}
    assert choose_prefill([idle, warm], OURS, (), hits) == warm
    assert choose_prefill([idle, warm], OURS, (), {warm.boot_id: 200}) == idle


def test_a_sequence_counts_as_some_queued_tokens() -> None:
    few, many = worker("b", queued=SEQUENCE_TOKENS + 1), worker("a", running=2)
    assert choose_prefill([few, many], OURS, ()) == few
    assert choose_prefill([few, worker("a", running=1)], OURS, ()) == worker("a", running=1)


def test_of_equal_workers_the_lower_identity_is_chosen() -> None:
    assert choose_prefill([worker("b"), worker("a")], OURS, ()) == worker("a")


def test_the_longest_prefix_is_read_from_the_less_busy_of_its_holders() -> None:
    short, busy, idle = worker("a"), worker("b", queued=9), worker("c", role="decode")
    held = {short.boot_id: 3, busy.boot_id: 5, idle.boot_id: 5}
    assert choose_holder([short, busy, idle], OURS, (), held) == idle
    assert choose_holder([short, busy], OURS, (), held) == busy
    assert choose_holder([short, busy, idle], OURS, {idle.boot_id, busy.boot_id}, held) == (short)


def test_nobody_is_asked_who_is_not_known_to_hold_something_and_to_serve_it() -> None:
    holder = worker("a")
    held = {holder.boot_id: 2}
    for other in (
        replace(holder, state="draining"),
        replace(holder, fingerprint=OTHER.digest.hex(), layout=OTHER),
        worker("b"),
    ):
        assert choose_holder([other], OURS, (), held) is None
    assert choose_holder([holder], OURS, (), {}) is None
    assert choose_holder([holder], OURS, (), {holder.boot_id: 0}) is None


def test_a_run_of_pages_ends_at_the_first_one_a_worker_lacks() -> None:
    assert held_runs([{"a", "b"}, {"a"}, {"a", "b", "c"}]) == {"a": 3, "b": 1}
    assert held_runs([]) == {}
