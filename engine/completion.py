"""What a request brings, as a stream of items and as a whole. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.finish import FinishReason
from engine.resume import ChoiceSoFar


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the chosen token and of the top ones, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """``output_tokens`` of all choices; ``resumed_tokens`` of them were made before the stream was
    last continued, by another worker or in another call. The rest tells of the worker that ended
    it: ``accepted_tokens`` of the drafted ones were right, each took no pass of its own."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    handed_over_tokens: int = 0
    preemptions: int = 0
    resumed_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds since the request was admitted (queue, first token, total) or a span (prefill)."""

    queue_s: float
    prefill_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Started:
    """First item: the request was admitted.

    ``max_tokens`` is the limit of the output in effect. Whoever continues the stream must have the
    same ``numerics_digest`` (``LayoutFingerprint``).
    """

    request_id: bytes
    seed: int
    prompt_ids: tuple[int, ...]
    boot_id: bytes
    max_tokens: int = 0
    numerics_digest: bytes = b""


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one choice; ``finish_reason`` is set in its last one.

    ``foreign_kv`` is the digest that its KV stands under if some of it is of other numerics than
    the worker's own: nobody would continue the stream with the same tokens.
    """

    choice_index: int
    first_index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None
    foreign_kv: bytes = b""


@dataclass(frozen=True, slots=True)
class Finished:
    """Last item. ``prefilled`` says where the prompt was computed: remote, local or cached."""

    usage: Usage
    timings: Timings
    prefilled: str


StreamItem = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing new for a while, though the request is alive: it waits for pages or a step.

    Between services only; callers do not see it.
    """

    waited_s: float


@dataclass(frozen=True, slots=True)
class Completion:
    """One choice of one prompt, whole. ``logprobs`` is None unless asked for."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason
    seed: int
    usage: Usage
    timings: Timings
    prompt_ids: tuple[int, ...]
    choice_index: int
    matched_stop: str | int | None
    prefilled: str


@dataclass(slots=True)
class _Choice:
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None


class Collector:
    """Puts the stream of one request together."""

    def __init__(self, wants_logprobs: bool) -> None:
        self._wants_logprobs = wants_logprobs
        self._started: Started | None = None
        self._finished: Finished | None = None
        self._choices: dict[int, _Choice] = {}

    def add(self, item: StreamItem) -> None:
        match item:
            case Started():
                self._started = item
            case Finished():
                self._finished = item
            case Delta():
                self._add_delta(item)

    def so_far(self) -> list[ChoiceSoFar]:
        """What has come, for ``resume``; this collector goes on with what comes then."""
        return [
            ChoiceSoFar(index, tuple(choice.token_ids), choice.finish_reason is not None)
            for index, choice in sorted(self._choices.items())
        ]

    def completions(self) -> list[Completion]:
        """One per choice, in order of choice. Only after the last item."""
        started, finished = self._started, self._finished
        assert started is not None
        assert finished is not None
        return [
            self._completion(index, self._choices[index], started, finished)
            for index in sorted(self._choices)
        ]

    def _add_delta(self, delta: Delta) -> None:
        choice = self._choices.setdefault(delta.choice_index, _Choice())
        assert delta.first_index == len(choice.token_ids), "a token was lost or doubled"
        choice.token_ids += delta.token_ids
        choice.text.append(delta.text)
        choice.logprobs += delta.logprobs
        choice.finish_reason = delta.finish_reason or choice.finish_reason
        choice.matched_stop = delta.matched_stop if delta.finish_reason else None

    def _completion(
        self, index: int, choice: _Choice, started: Started, finished: Finished
    ) -> Completion:
        assert choice.finish_reason is not None
        return Completion(
            token_ids=tuple(choice.token_ids),
            text="".join(choice.text),
            logprobs=tuple(choice.logprobs) if self._wants_logprobs else None,
            finish_reason=choice.finish_reason,
            seed=started.seed,
            usage=finished.usage,
            timings=finished.timings,
            prompt_ids=started.prompt_ids,
            choice_index=index,
            matched_stop=choice.matched_stop,
            prefilled=finished.prefilled,
        )
