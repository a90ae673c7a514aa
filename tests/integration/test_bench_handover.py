"""The handover benchmark against real processes and a real Redis, with the hash model."""

from __future__ import annotations

import pytest

from bench import __main__ as cli
from bench import handover, machine
from bench.handover import Services, bench_handover
from bench.load import PAGE_SIZE, Load
from engine.errors import InvalidRequest
from engine.model.hash_model import HashModel


def test_a_handover_is_measured_between_processes_by_every_transport(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "TRY_FOR_S", 0.0)
    lines: list[str] = []
    services = Services("hash", "fp32", None, ("shm", "grpc"))
    rows = bench_handover(services, Load(1, 200, 1, 2), lines.append)
    num_pages = -(-199 // PAGE_SIZE)
    assert [row["transport"] for row in rows] == ["shm", "grpc"]
    for row in rows:
        assert row["bytes"] == num_pages * HashModel("fp32").spec.page_layout(32).page_bytes
        assert 0 < row["exposed_ms"] < row["first_token_remote_s"] * 1e3
        assert row["gbps"] > 0
        assert row["limit_ratio"] == pytest.approx(row["memcpy_ms"] / row["exposed_ms"])
        assert row["tokens_per_s"] == pytest.approx(200 / row["first_token_remote_s"])
    assert lines[-1] == "handover by grpc: 2/2"


def test_a_transport_nobody_knows_is_refused_by_name() -> None:
    options = cli.parser().parse_args(["handover", "--transports", "smoke"])
    with pytest.raises(InvalidRequest, match="smoke"):
        handover.run(options, None, print)  # type: ignore[arg-type]
