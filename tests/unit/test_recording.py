"""Recordings of a scheduler: written as it runs, replayed to the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.cli.main import main
from engine.plan import (
    Cancel,
    Event,
    Landed,
    Outcome,
    ReadsEnded,
    StepPlan,
    Submit,
)
from engine.recording import RecordedScheduler, RecordingError, replay
from engine.scheduler import SchedulerLimits
from engine.sequence import Goal
from kvstore.pool import PagePool


def record(path: Path) -> None:
    """A short run with every kind of event."""
    limits = SchedulerLimits(min_remote_tokens=16)
    scheduler = RecordedScheduler(PagePool(12, 16, lambda: 0.0), limits, bytes(16), path)
    reads: list[int] = []

    def step(*events: Event) -> StepPlan:
        plan = scheduler.plan(events)
        outcomes = {
            rows.name: Outcome((7,) * rows.wants_logits, rows.start > 45) for rows in plan.rows
        }
        scheduler.complete(plan, dict(outcomes))
        pages = (*plan.finished_pages, *plan.coming_pages)
        reads.extend(page.slot for page in pages)
        return plan

    step(
        Submit("prompt", Goal.PREFILL, tuple(range(40)), "tenant"),
        Submit("here", Goal.GENERATE, tuple(range(20))),
        Submit("there", Goal.GENERATE, tuple(range(41)), remote=True),
        Submit("after", Goal.GENERATE, tuple(range(20)), after="here"),
    )
    step(Landed("there", 40))
    for _ in range(10):
        step()
    step(ReadsEnded("prompt", tuple(reads)), Cancel("prompt"), Cancel("after"))
    assert not scheduler.num_running or step()


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "steps.jsonl"
    record(path)
    return path


def test_a_recording_replays_to_the_same_answers(recording: Path) -> None:
    answers = list(replay(recording))
    assert len(answers) > 20
    assert not any(answers)


def test_a_service_that_starts_again_appends_a_recording_of_its_own(recording: Path) -> None:
    once = len(list(replay(recording)))
    record(recording)
    answers = list(replay(recording))
    assert len(answers) == 2 * once
    assert not any(answers)


def test_another_answer_is_found_at_its_line(recording: Path) -> None:
    lines = recording.read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace('"cached_tokens":0', '"cached_tokens":16', 1)
    recording.write_text("".join(lines))
    differences = [answer for answer in replay(recording) if answer]
    assert [difference.line for difference in differences] == [2]


def test_a_torn_last_line_is_what_a_killed_process_leaves(recording: Path) -> None:
    text = recording.read_text()
    recording.write_text(text[: -len(text.splitlines()[-1]) // 2])
    assert not any(replay(recording))


@pytest.mark.parametrize(
    "text",
    [
        "no JSON\n",
        '{"kind":"plan","events":[],"plan":{}}\n',
        '{"kind":"begin","num_pages":4}\n',
        "[]\n",
        '{"kind":"begin","num_pages":4,"page_size":16,"limits":{"max_sequences":0},'
        '"fingerprint":""}\n',
    ],
)
def test_what_is_no_recording_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text(text)
    with pytest.raises(RecordingError, match=r"steps\.jsonl:1: "):
        list(replay(path))
    assert main(["replay", str(path)]) == 1


def test_the_command_counts_equal_answers_and_fails_at_a_difference(
    recording: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(recording)]) == 0
    assert "all the same again" in capsys.readouterr().out
    recording.write_text(recording.read_text().replace('"token_ids":[7]', '"token_ids":[8]', 1))
    assert main(["replay", str(recording)]) == 1
    assert "differs" in capsys.readouterr().err
    assert main(["replay", str(recording.parent / "nothing.jsonl")]) == 1
