"""The reuse benchmark against real processes and a real Redis, with the hash model."""

from __future__ import annotations

import pytest

from bench import machine
from bench.load import PAGE_SIZE, Load
from bench.reuse import bench_reuse
from engine.model.hash_model import HashModel


def test_reading_a_prompt_from_anothers_cache_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "TRY_FOR_S", 0.0)
    lines: list[str] = []
    row = bench_reuse("hash", "fp32", None, Load(1, 200, 1, 2), lines.append)
    num_pages = 199 // PAGE_SIZE
    assert row["bytes"] == num_pages * HashModel("fp32").spec.page_layout(32).page_bytes
    assert 0 < row["read_ms"] < row["first_token_read_s"] * 1e3
    assert row["limit_ratio"] == pytest.approx(row["memcpy_ms"] / row["read_ms"])
    assert row["first_token_computed_s"] > 0
    assert lines[-1] == "reuse of 200 tokens: 2/2"
