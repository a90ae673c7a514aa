"""InferenceService over gRPC: protobuf to domain values and back, nothing else."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
from opentelemetry.context import Context

from decode_svc.admission import Admission
from decode_svc.config import DecodeSettings
from decode_svc.decider import Decider
from decode_svc.intake import IntakeDesk
from decode_svc.wanted import Wanted
from engine.admission import Capacity
from engine.completion import Delta, StreamItem, Waiting
from engine.errors import DeadlineExceeded, InvalidRequest, ModelError
from engine.lifecycle import Lifecycle
from engine.mailbox import AsyncEngine
from engine.outputs import ChunkDone
from engine.prompts import Prompt, encode_prompt
from engine.request import Request
from engine.serving.deadline import remaining_s
from engine.serving.status import maps_errors
from engine.telemetry.attributes import (
    GEN_AI_OPERATION_NAME,
    GEN_AI_PROVIDER_NAME,
    GEN_AI_REQUEST_CHOICE_COUNT,
    GEN_AI_REQUEST_MAX_TOKENS,
    GEN_AI_REQUEST_MODEL,
    GEN_AI_REQUEST_SEED,
    GEN_AI_REQUEST_TEMPERATURE,
    GEN_AI_REQUEST_TOP_K,
    GEN_AI_REQUEST_TOP_P,
    GEN_AI_RESPONSE_ID,
    GEN_AI_USAGE_INPUT_TOKENS,
)
from engine.telemetry.metrics import Metrics
from engine.telemetry.tracing import current_context, stage_span
from engine.tokenizer import Tokenizer
from engine.wire import item_to_wire, prompt_from_wire, resume_from_wire, sampling_from_wire
from kvstore.index import PageIndex, PageIndexError
from kvstore.transports.grpc_wire import fingerprint_to_wire
from quire.v1 import inference_pb2 as pb
from quire.v1 import inference_pb2_grpc

MAX_LABEL = 128
WAITING_EVERY_S = 0.5


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Generates, tokenizes, tells what is served."""

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        capacity: Capacity,
        settings: DecodeSettings,
        admission: Admission,
        desk: IntakeDesk,
        decider: Decider,
        index: PageIndex,
        metrics: Metrics,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._capacity = capacity
        self._settings = settings
        self._admission = admission
        self._desk = desk
        self._decider = decider
        self._index = index
        self._metrics = metrics

    @maps_errors
    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateResponse]:
        with self._metrics.counted():
            async for response in self._generate(request, context):
                yield response

    @maps_errors
    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.TokenizeResponse:
        prompt = prompt_from_wire(request)
        return pb.TokenizeResponse(token_ids=await self._encode(prompt))

    @maps_errors
    async def GetModel(
        self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetModelResponse:
        spec = self._engine.core.model.spec
        return pb.GetModelResponse(
            name=spec.name,
            fingerprint=fingerprint_to_wire(self._engine.core.fingerprint),
            vocab_size=spec.vocab_size,
            max_context=spec.max_context,
            eos_token_ids=sorted(spec.eos_token_ids),
            max_prompt_tokens=self._capacity.max_prompt_tokens,
            peers=await self._peers(),
        )

    async def _generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateResponse]:
        budget_s = remaining_s(context, self._settings.max_request_s)
        trace = current_context()
        with stage_span(Lifecycle.ADMIT) as span:
            self._admission.check_open()
            job = await self._job(request, trace, time.monotonic() + budget_s)
            span.set_attributes(self._attributes_of(job) | _attributes_of_try(request))
        with self._admission.admit(len(job.first_ids)) as ticket:
            async for item in _until(job.stream(self._engine), budget_s):
                if isinstance(item, Delta):
                    ticket.first_token()
                if not isinstance(item, Waiting):
                    self._metrics.see(item)
                yield item_to_wire(item)

    async def _job(self, request: pb.GenerateRequest, trace: Context, deadline: float) -> Request:
        """The request as the engine takes it. Raises InvalidRequest."""
        spec = self._engine.core.model.spec
        if request.model and request.model != spec.name:
            raise ModelError(f"model {request.model!r} is not served here; {spec.name!r} is")
        for field, value in (("label", request.label), ("tenant", request.tenant)):
            if len(value) > MAX_LABEL:
                raise InvalidRequest(field, "it is too long", f"0 to {MAX_LABEL} characters")
        params = sampling_from_wire(request.sampling)
        prompt_ids = await self._encode(prompt_from_wire(request))
        job = Request(
            prompt_ids=prompt_ids,
            params=params,
            capacity=self._capacity,
            tenant=request.tenant,
            resume=resume_from_wire(request),
            waiting_every_s=WAITING_EVERY_S,
            output_queue=self._settings.output_queue,
            parent=trace,
        )
        job.on_chunk = self._saw_chunk
        if self._settings.prefill != "local":
            resumed = bool(job.resume)
            wanted = Wanted(job.request_id, job.first_ids, request.tenant, deadline, resumed)
            job.intake = functools.partial(self._desk.fill, wanted)
        return job

    def _saw_chunk(self, chunk: ChunkDone) -> None:
        self._decider.saw_chunk(chunk.num_tokens, (chunk.ended_ns - chunk.started_ns) / 1e9)

    def _attributes_of(self, job: Request) -> dict[str, str | int | float]:
        params = job.params
        assert params.seed is not None
        return {
            GEN_AI_OPERATION_NAME: "text_completion",
            GEN_AI_PROVIDER_NAME: "quire",
            GEN_AI_REQUEST_MODEL: self._engine.core.model.spec.name,
            GEN_AI_REQUEST_CHOICE_COUNT: params.n,
            GEN_AI_REQUEST_MAX_TOKENS: params.max_tokens or 0,
            GEN_AI_REQUEST_TEMPERATURE: params.temperature,
            GEN_AI_REQUEST_TOP_P: params.top_p,
            GEN_AI_REQUEST_TOP_K: params.top_k,
            GEN_AI_REQUEST_SEED: str(params.seed),  # 64 bits do not fit the signed attribute
            GEN_AI_RESPONSE_ID: job.request_id.hex(),
            GEN_AI_USAGE_INPUT_TOKENS: len(job.prompt_ids),
        }

    async def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Long text is tokenized beside the event loop."""
        return await asyncio.to_thread(encode_prompt, prompt, self._tokenizer)

    async def _peers(self) -> list[pb.Peer]:
        """Other decode services of the same fingerprint, as far as the index knows."""
        try:
            workers = await self._index.workers("decode")
        except PageIndexError:
            return []
        core = self._engine.core
        return [
            pb.Peer(endpoint=worker.endpoint, boot_id=bytes.fromhex(worker.boot_id))
            for worker in workers
            if worker.fingerprint == core.fingerprint.digest.hex()
            and worker.state == "serving"
            and worker.boot_id != core.boot_id.hex()
        ]


def _attributes_of_try(request: pb.GenerateRequest) -> dict[str, str | int | float]:
    return {
        "quire.label": request.label,
        "quire.attempt": max(request.attempt, 1),
        "quire.resumed_tokens": sum(len(choice.token_ids) for choice in request.resume),
    }


async def _until(
    items: AsyncGenerator[StreamItem | Waiting, None], budget_s: float
) -> AsyncIterator[StreamItem | Waiting]:
    """Passes items on until the time is over, then raises DeadlineExceeded; always closes them."""
    ends = asyncio.get_running_loop().time() + budget_s
    try:
        while True:
            try:
                async with asyncio.timeout_at(ends):
                    item = await anext(items)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise DeadlineExceeded("the request's time is over") from None
            yield item
    finally:
        await items.aclose()
