"""Settings that both services have; each adds its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.config import setting
from engine.core import CoreSettings
from engine.modes import DEFAULT_WEIGHTS, KV_MODES, WEIGHT_MODES
from engine.scheduler import SchedulerLimits
from engine.serving.server import Listen
from engine.telemetry.logs import LEVELS
from kvstore.transports.choice import AUTO, NAMES


@dataclass(frozen=True)
class WorkerSettings:
    """One worker: where it listens, what it runs, how much it takes."""

    host: str = setting("127.0.0.1", help="address to listen on")
    port: int = setting(0, help="TCP port; 0 takes a free one", minimum=0, maximum=65535)
    advertise_host: str = setting("", help="how other workers reach this host, if not by `host`")
    advertise_port: int = setting(
        0,
        help="the port others reach this one by, behind a proxy; 0: the one listened on",
        minimum=0,
        maximum=65535,
    )
    redis: str = setting("", help="URL of a Redis or Valkey; without one the worker stands alone")
    model: str = setting("smollm2", help="a model's name or path")
    weights: str = setting(DEFAULT_WEIGHTS, help="weight mode", choices=WEIGHT_MODES)
    kv: str = setting("auto", help="KV dtype", choices=("auto", *KV_MODES))
    page_size: int = setting(32, help="tokens per page, a multiple of 16", minimum=16, maximum=1024)
    pool_tokens: int = setting(
        16384, help="size of the KV pool in tokens", minimum=16, maximum=2**31 - 1
    )
    max_sequences: int = setting(64, help="sequences in a step at most", minimum=1, maximum=4096)
    max_step_tokens: int = setting(512, help="rows in a step at most", minimum=1, maximum=65536)
    chunk_tokens: int = setting(
        512, help="rows of one prompt in a step at most", minimum=1, maximum=65536
    )
    mixed_prompt_tokens: int = setting(
        128,
        help="rows of prompts in a step that other sequences wait for",
        minimum=1,
        maximum=65536,
    )
    min_remote_tokens: int = setting(
        64,
        help="a prompt with fewer uncached tokens is prefilled where it is decoded",
        minimum=1,
        maximum=2**31 - 1,
    )
    transports: tuple[str, ...] = setting(
        ("auto",),
        help="how pages may be handed over, best first; auto: shm where it can be had, then grpc",
        choices=(AUTO, *NAMES),
    )
    page_lease_s: float = setting(
        10.0,
        help="seconds another worker may take to read cached pages it asked for",
        minimum=0.05,
        maximum=600.0,
    )
    drain_s: float = setting(
        30.0, help="seconds running requests have at shutdown", minimum=0.0, maximum=86400.0
    )
    max_calls: int = setting(
        4096, help="gRPC calls at once, all kinds together", minimum=1, maximum=1_000_000
    )
    otlp_endpoint: str = setting("", help="URL of an OTLP/gRPC collector for traces")
    trace_file: Path | None = setting(None, help="file that spans are appended to, one JSON a line")
    metrics_port: int = setting(
        -1,
        help="port of Prometheus /metrics; 0 takes a free one, -1 none",
        minimum=-1,
        maximum=65535,
    )
    log_level: str = setting("info", help="least severe log line", choices=LEVELS)
    check_pages: bool = setting(False, help="check the conservation of pages at every step")
    swap_bytes: int = setting(
        0,
        help="room for pages of preempted sequences; 0 computes them again",
        minimum=0,
        maximum=2**50,
    )
    swap_dir: Path | None = setting(
        None, help="folder for a file with that room; without one it is host memory"
    )
    record: Path | None = setting(
        None, help="file that the scheduler's events and plans are appended to, for `quire replay`"
    )
    supervised: bool = setting(
        False, help="a parent handles Ctrl-C; end when it ends (set by `quire up`)"
    )

    @property
    def listen(self) -> Listen:
        return Listen(
            host=self.host,
            port=self.port,
            advertise_host=self.advertise_host,
            advertise_port=self.advertise_port,
            max_concurrent_calls=self.max_calls,
            drain_s=self.drain_s,
        )

    @property
    def core(self) -> CoreSettings:
        """Raises ValueError if the limits do not fit each other."""
        limits = SchedulerLimits(
            max_sequences=self.max_sequences,
            max_step_tokens=self.max_step_tokens,
            chunk_tokens=self.chunk_tokens,
            mixed_prompt_tokens=self.mixed_prompt_tokens,
            min_remote_tokens=self.min_remote_tokens,
        )
        num_pages = -(-self.pool_tokens // self.page_size)
        return CoreSettings(
            num_pages,
            self.page_size,
            limits,
            self.check_pages,
            self.record,
            self.swap_bytes,
            self.swap_dir,
        )
