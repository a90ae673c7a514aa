"""The handover benchmark against real processes and a real Redis, with the hash model."""

from __future__ import annotations

import pytest

from bench import machine
from bench.handover import Services, bench_handover
from bench.load import PAGE_SIZE, Load
from engine.model.hash_model import HashModel


def test_a_handover_is_measured_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "TRY_FOR_S", 0.0)
    lines: list[str] = []
    row = bench_handover(Services("hash", "fp32", None), Load(1, 200, 1, 2), lines.append)
    num_pages = -(-199 // PAGE_SIZE)
    assert row["handover_bytes"] == num_pages * HashModel("fp32").spec.page_layout(32).page_bytes
    assert 0 < row["exposed_s"] < row["first_token_remote_s"]
    assert row["limit_ratio"] == pytest.approx(row["copy_s"] / row["exposed_s"])
    assert row["tokens_per_s"] == pytest.approx(200 / row["first_token_remote_s"])
    assert lines[-1] == "handover: 2/2"
