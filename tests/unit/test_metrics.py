"""Metrics: names, values, and the endpoint that shows them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.request import urlopen

import pytest

from engine.completion import Delta, Finished, Timings, Usage
from engine.speculation import SpeculationStats
from engine.telemetry.metrics import Load, Metrics, MetricsServer

NAME = re.compile(r"quire_[a-z_]+(_total|_seconds|_running|_waiting|_pages|_created|_bucket)?")


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    metrics = Metrics()
    lookup = SpeculationStats("lookup", proposed=9, accepted_at=[4, 2, 0], draft_time=0.5)
    drafts = (lookup, SpeculationStats("head"))
    metrics.watch(lambda: Load(2, 3, {"free": 7, "sealed": 1}, {"step_rows": 12}, drafts))
    with metrics.counted():
        pass
    metrics.handover_bytes.labels("shm").inc(4096)
    usage = Usage(prompt_tokens=10, output_tokens=4, cached_tokens=6, preemptions=1)
    timings = Timings(queue_s=0.02, prefill_s=0.1, first_token_s=0.2, total_s=1.0)
    metrics.see(Delta(0, 0, (1, 2, 3, 4), "text"))
    metrics.see(Finished(usage, timings, "local"))
    server = MetricsServer(metrics, "127.0.0.1", 0)
    yield server
    server.close()


def scrape(server: MetricsServer) -> dict[str, float]:
    with urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as reply:
        lines = reply.read().decode().splitlines()
    values = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in values}


def test_what_was_counted_is_shown(server: MetricsServer) -> None:
    shown = scrape(server)
    assert shown['quire_requests_total{outcome="ok"}'] == 1
    assert shown["quire_output_tokens_total"] == 4
    assert shown["quire_step_rows_total"] == 12
    assert shown["quire_time_per_output_token_seconds_sum"] == pytest.approx(0.8 / 3)
    assert shown['quire_handover_bytes_total{transport="shm"}'] == 4096
    assert shown["quire_prefix_hit_tokens_total"] == 6
    assert shown["quire_preemptions_total"] == 1
    assert shown["quire_time_to_first_token_seconds_sum"] == pytest.approx(0.2)
    assert shown["quire_request_seconds_count"] == 1
    assert shown['quire_queue_seconds_bucket{le="0.01"}'] == 0
    assert shown['quire_queue_seconds_bucket{le="0.025"}'] == 1


def test_drafts_are_counted_by_proposer_and_position(server: MetricsServer) -> None:
    shown = scrape(server)
    assert shown['quire_drafted_tokens_total{proposer="lookup"}'] == 9
    assert shown['quire_draft_seconds_total{proposer="lookup"}'] == 0.5
    accepted = [
        shown[f'quire_accepted_tokens_total{{position="{at}",proposer="lookup"}}']
        for at in range(3)
    ]
    assert accepted == [4, 2, 0]
    assert shown['quire_drafted_tokens_total{proposer="head"}'] == 0


def test_load_is_asked_at_each_scrape(server: MetricsServer) -> None:
    shown = scrape(server)
    assert (shown["quire_running"], shown["quire_waiting"]) == (2, 3)
    assert shown['quire_pages{state="free"}'] == 7
    assert shown['quire_pages{state="sealed"}'] == 1


def test_every_name_is_ours_and_has_no_colon(server: MetricsServer) -> None:
    names = {name.partition("{")[0] for name in scrape(server)}
    assert len(names) > 10
    assert all(NAME.match(name) for name in names)
    assert not any(":" in name for name in names)


def test_a_request_that_fails_is_counted_under_its_error() -> None:
    metrics = Metrics()
    with pytest.raises(ValueError, match="x"), metrics.counted():
        raise ValueError("x")
    labels = {"outcome": "ValueError"}
    assert metrics.registry.get_sample_value("quire_requests_total", labels) == 1


def test_two_services_in_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.preemptions.inc()
    assert first.registry.get_sample_value("quire_preemptions_total") == 1
    assert second.registry.get_sample_value("quire_preemptions_total") == 0


def test_busy_port_is_refused_with_its_address(server: MetricsServer) -> None:
    with pytest.raises(OSError, match=rf"metrics on 127\.0\.0\.1:{server.port}: "):
        MetricsServer(Metrics(), "127.0.0.1", server.port)
