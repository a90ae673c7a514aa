"""Settings of the decode service."""

from __future__ import annotations

from dataclasses import dataclass, replace

from decode_svc.decider import PREFERENCES
from engine.config import setting
from engine.core import CoreSettings
from engine.modes import DEFAULT_DRAFT_WEIGHTS, SPECULATION_MODES, WEIGHT_MODES
from engine.serving.settings import WorkerSettings


@dataclass(frozen=True)
class DecodeSettings(WorkerSettings):
    """Flags, then QUIRE_* environment, then a file, then these defaults."""

    max_requests: int = setting(
        default=256, help="requests admitted at once; more are refused", minimum=1, maximum=65536
    )
    max_queued_tokens: int = setting(
        default=262144,
        help="prompt tokens of requests without a first token yet; more are refused",
        minimum=1,
        maximum=2**31 - 1,
    )
    output_queue: int = setting(
        default=1024,
        help="tokens a client may be behind before its stream is failed",
        minimum=1,
        maximum=1_000_000,
    )
    max_request_s: float = setting(
        default=600.0, help="longest time a request may take", minimum=0.1, maximum=86400.0
    )
    handover_idle_s: float = setting(
        default=3.0,
        help="seconds without a message after which a prefill worker counts as lost",
        minimum=0.1,
        maximum=600.0,
    )
    prefill: str = setting(
        default="auto",
        help="where a prompt's pages come from: auto (whichever way is predicted to be fastest), "
        "local (computed here), remote (a prefill worker wherever possible), "
        "pull (other workers' caches first, then a prefill worker)",
        choices=("local", *PREFERENCES),
    )
    allow_foreign_kv: bool = setting(
        False,
        help="take pages of other KV dtypes and numerics too where no others are to be had; "
        "the tokens are then not those of one engine",
    )
    speculate: str = setting(
        "off",
        help="guess tokens and verify them in the step of the next one; lookup: copied from where "
        "the last tokens stood before; history: there or in what the tenant was answered before; "
        "model: by another model; head: by a small head trained for the model; auto: lookup, and a "
        "head where there is one for what lookup finds nothing for. It changes no token",
        choices=SPECULATION_MODES,
    )
    draft: str = setting(
        "",
        help="name or path of the model that guesses (the served one without), or of the head "
        "(the packaged one without)",
    )
    draft_weights: str = setting(
        DEFAULT_DRAFT_WEIGHTS, help="how its weights are kept", choices=WEIGHT_MODES
    )

    @property
    def core(self) -> CoreSettings:
        return replace(super().core, speculate=self.speculate)
