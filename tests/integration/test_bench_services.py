"""The benchmarks that run services or processes of their own, in small, with the hash model."""

from __future__ import annotations

import asyncio
import os

import pytest

from bench.load import PAGE_SIZE, Load
from bench.memory import bench_memory
from bench.serve import bench_serve
from bench.steal import bench_steal
from engine.errors import InvalidRequest, PeerUnavailable
from engine.model.hash_model import HashModel
from engine.model.load import load_model
from kernels.peaks import Peaks

PEAKS = Peaks(2, 10.0, 400.0, 200.0, 100.0, int8_by="x", fp32_by="y")


@pytest.mark.slow
def test_serving_is_measured_from_a_start_to_the_last_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QUIRE_PREFILL", "remote")
    lines: list[str] = []
    load = Load(batch=4, prompt=100, tokens=6, repeat=2)
    row = bench_serve("hash", "fp32", None, load, PEAKS, lines.append)
    assert row["ratio_to_alone"] == pytest.approx(row["tokens_per_s"] / row["alone_tokens_per_s"])
    assert row["remote_share"] > 0
    assert 0 < row["ttft_p50_s"] <= row["ttft_p99_s"] < row["start_s"]
    assert 0 < row["itl_p50_s"] <= row["itl_p99_s"]
    assert 0 < row["limit_ratio"] < 1
    assert lines[-1] == "serve 4 streams: 2/2"


def test_services_that_do_not_start_say_why() -> None:
    load = Load(batch=1, prompt=10, tokens=1, repeat=1)
    with pytest.raises(PeerUnavailable, match="/no/such/model"):
        bench_serve("/no/such/model", "fp32", None, load, PEAKS, lambda _: None)


def test_the_memory_of_a_decode_service_is_more_than_its_pool() -> None:
    load = Load(batch=2, prompt=40, tokens=4, repeat=1)
    row = bench_memory("hash", "fp32", None, load, lambda _: None)
    page_bytes = HashModel("fp32").spec.page_layout(PAGE_SIZE).page_bytes
    assert row["pool_bytes"] == page_bytes * -(-load.pool_tokens // PAGE_SIZE)
    assert 10_000_000 < row["import_bytes"] < row["peak_bytes"]
    assert 0 < row["other_bytes"] < row["peak_bytes"]


def test_a_core_is_taken_in_the_middle_of_decoding() -> None:
    loaded = load_model("hash")
    load = Load(batch=2, prompt=40, tokens=4000, repeat=1)
    core = max(os.sched_getaffinity(0))
    row = asyncio.run(bench_steal(loaded, load, core, seconds=0.1))
    for part in ("before", "during", "after", "one_core_fewer"):
        assert row[f"{part}_tokens_per_s"] > 0, part
    fewer = row["one_core_fewer_tokens_per_s"]
    assert row["during_to_one_core_fewer"] == row["during_tokens_per_s"] / fewer


def test_sequences_that_end_too_early_are_no_result() -> None:
    load = Load(batch=1, prompt=40, tokens=20, repeat=1)
    with pytest.raises(InvalidRequest, match="--seconds"):
        asyncio.run(bench_steal(load_model("hash"), load, max(os.sched_getaffinity(0)), 0.3))
