"""Settings of the prefill service."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import setting
from engine.serving.settings import WorkerSettings


@dataclass(frozen=True)
class PrefillSettings(WorkerSettings):
    """Flags, then QUIRE_* environment, then a file, then these defaults."""

    max_requests: int = setting(
        default=64, help="prompts in progress; more are refused", minimum=1, maximum=4096
    )
    max_queued_tokens: int = setting(
        default=65536,
        help="prompt tokens in progress; more are refused",
        minimum=1,
        maximum=2**31 - 1,
    )
    lease_s: float = setting(
        default=10.0,
        help="seconds pages stay readable after the commit without an acknowledgement",
        minimum=0.05,
        maximum=600.0,
    )
    receiver_idle_s: float = setting(
        default=5.0,
        help="seconds a receiver may leave a message untaken before its handover is given up",
        minimum=0.1,
        maximum=600.0,
    )
