"""Requests and answers of InferenceService as protobuf messages and back.

Both ends use this: the decode service and ``RemoteEngine``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from engine.chat_template import ChatMessage
from engine.completion import (
    Delta,
    Finished,
    Started,
    StreamItem,
    Timings,
    TokenLogprobs,
    Usage,
    Waiting,
)
from engine.errors import InvalidRequest
from engine.finish import FinishReason
from engine.prompts import Prompt
from engine.resume import ChoiceSoFar
from engine.sampling_params import SamplingParams
from quire.v1 import inference_pb2 as pb

_SCALARS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
    "max_tokens",
    "min_tokens",
    "logprobs",
)
_LISTS = ("allowed_token_ids", "banned_token_ids", "stop", "stop_token_ids")
_FLAGS = ("include_stop", "ignore_eos")

_FINISH_TO_WIRE = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_FINISH_FROM_WIRE = {wire: reason for reason, wire in _FINISH_TO_WIRE.items()}


def sampling_to_wire(params: SamplingParams) -> pb.SamplingParams:
    message = pb.SamplingParams(logit_bias=dict(params.logit_bias))
    for name in _SCALARS:
        value = getattr(params, name)
        if value is not None:
            setattr(message, name, value)
    for name in _LISTS:
        getattr(message, name).extend(getattr(params, name))
    for name in _FLAGS:
        setattr(message, name, getattr(params, name))
    return message


def sampling_from_wire(message: pb.SamplingParams) -> SamplingParams:
    """Raises InvalidRequest naming the field that is out of range."""
    values: dict[str, object] = {
        name: getattr(message, name)
        for name in _SCALARS
        if message.HasField(name)  # type: ignore[arg-type]
    }
    values |= {name: tuple(getattr(message, name)) for name in _LISTS}
    values |= {name: getattr(message, name) for name in _FLAGS}
    values["logit_bias"] = dict(message.logit_bias)
    return SamplingParams(**values)  # type: ignore[arg-type]


def prompt_to_wire(prompt: Prompt) -> pb.GenerateRequest:
    """A GenerateRequest with only its prompt set."""
    if isinstance(prompt, str):
        return pb.GenerateRequest(text=prompt)
    messages = [part for part in prompt if isinstance(part, ChatMessage)]
    if messages:
        return pb.GenerateRequest(chat=_chat_to_wire(messages))
    ids = [part for part in prompt if isinstance(part, int)]
    if any(not 0 <= token_id < 2**32 for token_id in ids):
        raise InvalidRequest("prompt.token_ids", "an id is negative or huge", "ids of the model")
    return pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=ids))


def prompt_from_wire(message: pb.GenerateRequest | pb.TokenizeRequest) -> Prompt:
    """Raises InvalidRequest if no form of prompt is set."""
    if isinstance(message, pb.GenerateRequest) and message.HasField("tokens"):
        return tuple(message.tokens.token_ids)
    if message.HasField("chat"):
        return tuple(ChatMessage(each.role, each.content) for each in message.chat.messages)
    if message.HasField("text"):
        return message.text
    raise InvalidRequest("prompt", "it is missing", "text, tokens or chat")


def resume_to_wire(resume: Sequence[ChoiceSoFar]) -> list[pb.ResumeChoice]:
    """Raises InvalidRequest for numbers that no message can carry."""
    for position, choice in enumerate(resume):
        if any(not 0 <= number < 2**32 for number in (choice.choice_index, *choice.token_ids)):
            raise InvalidRequest(
                f"resume[{position}]", "a number is negative or huge", "choices and token ids"
            )
    return [
        pb.ResumeChoice(
            choice_index=choice.choice_index, token_ids=choice.token_ids, finished=choice.finished
        )
        for choice in resume
    ]


def resume_from_wire(message: pb.GenerateRequest) -> tuple[ChoiceSoFar, ...]:
    return tuple(
        ChoiceSoFar(each.choice_index, tuple(each.token_ids), each.finished)
        for each in message.resume
    )


def tokenize_to_wire(prompt: Prompt) -> pb.TokenizeRequest:
    generate = prompt_to_wire(prompt)
    if generate.HasField("chat"):
        return pb.TokenizeRequest(chat=generate.chat)
    return pb.TokenizeRequest(text=generate.text)


def item_to_wire(item: StreamItem | Waiting) -> pb.GenerateResponse:
    match item:
        case Started():
            started = pb.GenerateStarted(
                request_id=item.request_id,
                seed=item.seed,
                prompt_token_ids=item.prompt_ids,
                boot_id=item.boot_id,
                max_tokens=item.max_tokens,
                numerics_digest=item.numerics_digest,
            )
            return pb.GenerateResponse(started=started)
        case Waiting(waited_s):
            return pb.GenerateResponse(progress=pb.GenerateProgress(waited_s=waited_s))
        case Delta():
            return pb.GenerateResponse(delta=_delta_to_wire(item))
        case Finished(usage, timings, prefilled):
            finished = pb.GenerateFinished(
                usage=pb.Usage(**asdict(usage)),
                timings=pb.Timings(**asdict(timings)),
                prefilled=prefilled,
            )
            return pb.GenerateResponse(finished=finished)


def item_from_wire(message: pb.GenerateResponse) -> StreamItem | Waiting:
    """What a message tells; of a kind not known here, that the request is alive."""
    match message.WhichOneof("message"):
        case "started":
            return _started_from_wire(message.started)
        case "delta":
            return _delta_from_wire(message.delta)
        case "finished":
            return _finished_from_wire(message.finished)
        case _:
            return Waiting(message.progress.waited_s)


def _started_from_wire(message: pb.GenerateStarted) -> Started:
    return Started(
        request_id=message.request_id,
        seed=message.seed,
        prompt_ids=tuple(message.prompt_token_ids),
        boot_id=message.boot_id,
        max_tokens=message.max_tokens,
        numerics_digest=message.numerics_digest,
    )


def _finished_from_wire(message: pb.GenerateFinished) -> Finished:
    usage, timings = message.usage, message.timings
    return Finished(
        usage=Usage(**{name: getattr(usage, name) for name in Usage.__slots__}),
        timings=Timings(**{name: getattr(timings, name) for name in Timings.__slots__}),
        prefilled=message.prefilled,
    )


def _chat_to_wire(messages: list[ChatMessage]) -> pb.ChatPrompt:
    return pb.ChatPrompt(
        messages=[pb.ChatMessage(role=each.role, content=each.content) for each in messages]
    )


def _delta_to_wire(delta: Delta) -> pb.GenerateDelta:
    message = pb.GenerateDelta(
        choice_index=delta.choice_index,
        first_index=delta.first_index,
        token_ids=delta.token_ids,
        text=delta.text,
        logprobs=[_logprobs_to_wire(each) for each in delta.logprobs],
        finish_reason=_FINISH_TO_WIRE[delta.finish_reason],
        foreign_kv=delta.foreign_kv,
    )
    if isinstance(delta.matched_stop, str):
        message.stop_text = delta.matched_stop
    elif delta.matched_stop is not None:
        message.stop_token_id = delta.matched_stop
    return message


def _delta_from_wire(message: pb.GenerateDelta) -> Delta:
    matched = message.WhichOneof("matched_stop")
    return Delta(
        choice_index=message.choice_index,
        first_index=message.first_index,
        token_ids=tuple(message.token_ids),
        text=message.text,
        logprobs=tuple(_logprobs_from_wire(each) for each in message.logprobs),
        finish_reason=_FINISH_FROM_WIRE[message.finish_reason],
        matched_stop=getattr(message, matched) if matched else None,
        foreign_kv=message.foreign_kv,
    )


def _logprobs_to_wire(logprobs: TokenLogprobs) -> pb.PositionLogprobs:
    return pb.PositionLogprobs(
        chosen=pb.TokenLogprob(token_id=logprobs.token_id, logprob=logprobs.logprob),
        top=[pb.TokenLogprob(token_id=token, logprob=value) for token, value in logprobs.top],
    )


def _logprobs_from_wire(message: pb.PositionLogprobs) -> TokenLogprobs:
    return TokenLogprobs(message.chosen.token_id, message.chosen.logprob, tuple(_pairs(message)))


def _pairs(message: pb.PositionLogprobs) -> Iterator[tuple[int, float]]:
    return ((each.token_id, each.logprob) for each in message.top)
