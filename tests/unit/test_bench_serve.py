"""Serve, steal and memory: their arithmetic on numbers made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from bench.limits import Workload
from bench.load import Load
from bench.memory import figures as memory_figures
from bench.memory import status_bytes
from bench.serve import Stream, Wave, figures, gaps, percentiles, share_of_limit
from bench.steal import tokens_per_s
from bench.timed_model import Call
from engine.model.weights import Matrices
from kernels.peaks import Peaks
from kernels.ragged import RaggedBatch

PEAKS = Peaks(2, 10.0, 400.0, 200.0, 100.0, int8_by="x", fp32_by="y")


def wave(took_s: float, *arrivals: list[float], prefilled: str = "remote") -> Wave:
    streams = [Stream(each, len(each), prefilled) for each in arrivals]
    return Wave(streams, took_s)


def test_serving_is_compared_with_the_engine_alone_by_medians() -> None:
    served = [wave(4.0, [1.0, 2.0], [2.0, 4.0]), wave(8.0, [1.0, 8.0], [3.0, 5.0])]
    served.append(wave(5.0, [1.0, 2.0], [2.0, 5.0], prefilled="local"))
    alone = [wave(4.0, [1.0, 2.0], [3.0, 4.0])]
    row = figures(served, alone)
    assert row["tokens_per_s"] == pytest.approx(4 / 5.0)
    assert row["alone_tokens_per_s"] == pytest.approx(1.0)
    assert row["ratio_to_alone"] == pytest.approx(0.8)
    assert row["remote_share"] == pytest.approx(4 / 6)
    assert row["ttft_p50_s"] == pytest.approx(1.5)
    assert row["itl_p50_s"] == pytest.approx(2.0)


def test_percentiles_are_interpolated_between_values() -> None:
    row = percentiles("ttft", [float(value) for value in range(101)])
    assert row == {"ttft_p50_s": 50.0, "ttft_p90_s": 90.0, "ttft_p99_s": 99.0}


def test_the_gap_between_messages_is_what_a_reader_waits() -> None:
    assert gaps([1.0, 1.5, 3.0]) == [0.5, 1.5]
    assert gaps([1.0]) == []


def test_the_limit_of_serving_is_prefill_and_all_steps_of_decode() -> None:
    workload = Workload(
        layers=Matrices(10**9, 4 * 10**9),
        head=Matrices(25 * 10**7, 10**9),
        arithmetic="fp32",
        kv_token_bytes=10**6,
        attention_ops=0,
        kv_arithmetic="fp32",
    )
    row = share_of_limit(0.5, Load(batch=1, prompt=90, tokens=20, repeat=1), workload, PEAKS)
    # prefill 90 x 2 GFLOP: 1.8 s; a step reads 5 GB and 100 x 1 MB: 0.51 s
    assert row["bytes_per_step"] == 5 * 10**9 + 100 * 10**6
    assert row["limit_ratio"] == pytest.approx((1.8 + 20 * 0.51) / 40)


def step(ended: float, num_logits: int) -> Call:
    rows = np.zeros(2, dtype=np.int64)
    starts = np.array([0, 1, 2])
    pages = np.zeros((2, 1), dtype=np.int32)
    return Call(ended - 0.1, ended, RaggedBatch(rows, rows, starts, pages, rows[:num_logits]))


def test_tokens_are_counted_by_when_their_step_ended() -> None:
    calls = [step(ended, 2) for ended in (0.9, 1.0, 1.5, 2.9, 3.0)] + [step(1.2, 1)]
    assert tokens_per_s(calls, batch=2, began=1.0, ended=3.0) == pytest.approx(2 * 3 / 2.0)


@pytest.mark.parametrize(("other", "within"), [(150_000_000, True), (150_000_001, False)])
def test_what_is_neither_import_weights_nor_pool_must_not_exceed_150_mb(
    other: int, within: bool
) -> None:
    row = memory_figures(other + 650, after_import=300, weights=250, pool=100)
    assert row["other_bytes"] == other
    assert row["within"] is within


def test_the_kernels_kilobytes_are_1024_bytes() -> None:
    status = "Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t 1024 kB\n"
    assert status_bytes(status, "VmHWM") == 2 << 20
    assert status_bytes(status, "VmRSS") == 1 << 20
