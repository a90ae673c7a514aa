"""Metrics of one process, in Prometheus form, in base units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.completion import Delta, Finished, StreamItem
from engine.speculation import SpeculationStats

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_EXPOSED_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker holds at this moment."""

    num_running: int
    num_waiting: int
    pages: Mapping[str, int]
    """Number of slots of the pool by page state."""
    totals: Mapping[str, float]
    """What the steps so far add up to, by name: steps, rows, prompt rows, bytes, seconds."""
    drafts: tuple[SpeculationStats, ...] = ()


class Metrics:
    """All metrics of one service, in a registry of their own: several may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by outcome", "outcome")
        self.output_tokens = self._counter("output_tokens", "Tokens generated")
        self.prefix_hit_tokens = self._counter(
            "prefix_hit_tokens", "Prompt tokens found in the prefix cache"
        )
        self.preemptions = self._counter("preemptions", "Sequences that lost their pages to others")
        self.handovers = self._counter("handovers", "Handovers by outcome", "outcome")
        self.handover_bytes = self._counter(
            "handover_bytes", "Bytes of pages handed over, by transport", "transport"
        )
        self.leases = self._counter("page_leases", "Leases on cached pages by outcome", "outcome")
        self.lent_bytes = self._counter("lent_bytes", "Bytes of cached pages read by other workers")
        self.pulls = self._counter("pulls", "Pulls of cached pages by outcome", "outcome")
        self.pulled_pages = self._counter("pulled_pages", "Cached pages of others landed here")
        self.pulled_bytes = self._counter("pulled_bytes", "Their bytes")
        self.handover_seconds = self._histogram("handover", "A handover", _SECONDS)
        self.handover_exposed_seconds = self._histogram(
            "handover_exposed", "From the end of prefill to joining the batch", _EXPOSED_SECONDS
        )
        self.queue_seconds = self._histogram("queue", "Waiting for pages", _SECONDS)
        self.first_token_seconds = self._histogram(
            "time_to_first_token", "From admission to the first token", _SECONDS
        )
        self.output_token_seconds = self._histogram(
            "time_per_output_token", "After the first token, mean of a request", _TOKEN_SECONDS
        )
        self.request_seconds = self._histogram("request", "From admission to the end", _SECONDS)

    def watch(self, load: Callable[[], Load]) -> None:
        """Exports ``load()`` as gauges; it is called by each scrape, in the scrape's thread."""
        self.registry.register(_LoadCollector(load))

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts a request under how the block ends: ``ok``, or the name of the error."""
        outcome = "ok"
        try:
            yield
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            self.requests.labels(outcome).inc()

    def see(self, item: StreamItem) -> None:
        """Counts what an item of a request's stream tells."""
        match item:
            case Delta():
                self.output_tokens.inc(len(item.token_ids))
            case Finished():
                self._see_finished(item)

    def _see_finished(self, finished: Finished) -> None:
        usage, timings = finished.usage, finished.timings
        self.prefix_hit_tokens.inc(usage.cached_tokens)
        self.preemptions.inc(usage.preemptions)
        self.queue_seconds.observe(timings.queue_s)
        self.first_token_seconds.observe(timings.first_token_s)
        self.request_seconds.observe(timings.total_s)
        if usage.output_tokens > 1:
            rest_s = timings.total_s - timings.first_token_s
            self.output_token_seconds.observe(rest_s / (usage.output_tokens - 1))

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"quire_{name}_total", documentation, labels, registry=self.registry)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"quire_{name}_seconds", documentation, registry=self.registry, buckets=buckets
        )


class _LoadCollector(Collector):
    def __init__(self, load: Callable[[], Load]) -> None:
        self._load = load

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        yield GaugeMetricFamily("quire_running", "Sequences in the batch", load.num_running)
        yield GaugeMetricFamily("quire_waiting", "Sequences without pages", load.num_waiting)
        pages = GaugeMetricFamily("quire_pages", "Slots of the pool by state", labels=["state"])
        for state, count in load.pages.items():
            pages.add_metric([state], count)
        yield pages
        for name, value in load.totals.items():
            yield CounterMetricFamily(f"quire_{name}", "Of the engine's steps so far", value)
        if load.drafts:
            yield from _metrics_of(load.drafts)


def _metrics_of(proposers: Sequence[SpeculationStats]) -> Iterator[Metric]:
    labels = ["proposer"]
    proposed = CounterMetricFamily("quire_drafted_tokens", "Drafts verified", labels=labels)
    for drafts in proposers:
        proposed.add_metric([drafts.proposer], drafts.proposed)
    yield proposed
    seconds = CounterMetricFamily("quire_draft_seconds", "Time spent drafting", labels=labels)
    for drafts in proposers:
        seconds.add_metric([drafts.proposer], drafts.draft_time)
    yield seconds
    accepted = CounterMetricFamily(
        "quire_accepted_tokens",
        "Drafts that were right, by their position; each saved a pass",
        labels=[*labels, "position"],
    )
    for drafts in proposers:
        for position, count in enumerate(drafts.accepted_at):
            accepted.add_metric([drafts.proposer, str(position)], count)
    yield accepted


class MetricsServer:
    """Plain HTTP ``/metrics``, in a thread of its own, until closed."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Port 0 takes a free one; see ``port``. Raises OSError if the port cannot be had."""
        try:
            server, thread = start_http_server(port, addr=host, registry=metrics.registry)
        except OSError as error:
            raise OSError(error.errno, f"metrics on {host}:{port}: {error.strerror}") from None
        self._server: WSGIServer = server
        self._thread: Thread = thread

    @property
    def port(self) -> int:
        return self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
