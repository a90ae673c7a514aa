"""``RemoteEngine``: the client library. Same interface as ``LocalEngine``, over gRPC.

A stream that loses its worker goes on at another one, and the caller does not notice
(``engine.failover`` says where and until when).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import grpc

from engine.client import AsyncClient, BlockingClient, LoopThread
from engine.completion import StreamItem, Waiting
from engine.decode_channels import DecodeChannels
from engine.errors import (
    DeadlineExceeded,
    InvalidRequest,
    PeerUnavailable,
    QuireError,
    RequestCancelled,
)
from engine.failover import Course, Endpoints
from engine.prompts import Prompt
from engine.resume import ChoiceSoFar
from engine.sampling_params import SamplingParams
from engine.serving.status import from_rpc_error
from engine.stream_so_far import CannotContinue, StreamSoFar
from engine.telemetry.logs import fields
from engine.wire import (
    item_from_wire,
    prompt_to_wire,
    resume_to_wire,
    sampling_to_wire,
    tokenize_to_wire,
)
from quire.v1 import inference_pb2 as pb
from quire.v1 import inference_pb2_grpc

DEFAULT_TIMEOUT_S = 600.0
DEFAULT_IDLE_S = 2.0
ALONE_IDLE_S = 10.0
DEFAULT_PATIENCE_S = 10.0
FIRST_MESSAGE_S = 10.0
LEARN_EVERY_S = 10.0
LEARN_TIMEOUT_S = 1.0

T = TypeVar("T")
log = logging.getLogger(__name__)


class AsyncRemoteEngine(AsyncClient):
    """Sends requests to decode services in turn, and to others that these tell of in their place.

    ``timeout_s`` is the deadline of each request, over all workers it needs. A worker that is
    silent for ``idle_s`` is given up: one that lives sends something every half second. Where no
    other is known, one on a busy machine gets at least ``ALONE_IDLE_S``. A stream that lost its
    worker looks for another one for ``patience_s``, then raises why it broke.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        model: str = "",
        tenant: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        idle_s: float = DEFAULT_IDLE_S,
        patience_s: float = DEFAULT_PATIENCE_S,
    ) -> None:
        if not endpoints:
            raise InvalidRequest("endpoints", "there is none", "at least one host:port")
        self._model = model
        self._tenant = tenant
        self._timeout_s = timeout_s
        self._idle_s = idle_s
        self._patience_s = patience_s
        self._endpoints = Endpoints(endpoints, time.monotonic)
        self._channels = DecodeChannels()
        self._learning: asyncio.Task[None] | None = None
        self._learn_at = 0.0

    async def items(
        self, prompt: Prompt, params: SamplingParams, resume: Sequence[ChoiceSoFar] = ()
    ) -> AsyncGenerator[StreamItem, None]:
        deadline = time.monotonic() + self._timeout_s
        request = self._request(prompt, params, resume)
        so_far = StreamSoFar(resume)
        course = Course(self._endpoints, so_far, self._patience_s, time.monotonic)
        while True:
            endpoint = await self._next_worker(course, deadline)
            so_far.begin_attempt()
            attempt = self._attempt(endpoint, _continued(request, so_far), deadline)
            try:
                async for item in attempt:
                    new = so_far.take(item)
                    if new is not None:
                        yield new
                return
            except (QuireError, CannotContinue) as error:
                if self._channels.closed:
                    raise RequestCancelled("the client was closed") from error
                course.ended(endpoint, error)
                log.info(
                    "a request looks for another worker",
                    extra=fields(left=endpoint, why=error, tokens=so_far.num_tokens),
                )
            finally:
                await attempt.aclose()

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a text or conversation, as ``items`` would see them."""
        request = tokenize_to_wire(prompt)
        response = await self._ask(lambda stub: stub.Tokenize(request, timeout=self._timeout_s))
        return list(response.token_ids)

    async def model(self) -> pb.GetModelResponse:
        """What is served, its limits, and the other decode services of it."""
        request = pb.GetModelRequest()
        return await self._ask(lambda stub: stub.GetModel(request, timeout=self._timeout_s))

    async def close(self) -> None:
        if self._learning is not None:
            self._learning.cancel()
            await asyncio.gather(self._learning, return_exceptions=True)
        await self._channels.close()

    @property
    def _longest_silence_s(self) -> float:
        if len(self._endpoints.known) > 1:
            return self._idle_s
        return max(self._idle_s, ALONE_IDLE_S)

    def _request(
        self, prompt: Prompt, params: SamplingParams, resume: Sequence[ChoiceSoFar]
    ) -> pb.GenerateRequest:
        request = prompt_to_wire(prompt)
        request.sampling.CopyFrom(sampling_to_wire(params))
        request.model = self._model
        request.tenant = self._tenant
        request.resume.extend(resume_to_wire(resume))
        return request

    async def _next_worker(self, course: Course, deadline: float) -> str:
        """Waits until there is a worker to ask. Raises what the stream fails with if none comes."""
        while True:
            endpoint = course.choose()
            if endpoint is None:
                await self._learn()
                endpoint = course.choose()
            if time.monotonic() >= deadline:
                raise DeadlineExceeded("the request's time is over")
            if endpoint is not None:
                return endpoint
            pause_s = course.next_round()
            await asyncio.sleep(min(pause_s, max(deadline - time.monotonic(), 0.0)))

    async def _attempt(
        self, endpoint: str, request: pb.GenerateRequest, deadline: float
    ) -> AsyncGenerator[StreamItem, None]:
        """What one worker sends, up to its last message. Raises QuireError."""
        idle_s = FIRST_MESSAGE_S
        with self._channels.stub(endpoint) as stub:
            call = stub.Generate(request, timeout=max(deadline - time.monotonic(), 0.0))
            messages = aiter(call)  # not call.read(): that skips what came just before an error
            try:
                while True:
                    async with asyncio.timeout(idle_s):
                        message = await anext(messages)
                    idle_s = self._longest_silence_s
                    self._endpoints.have_served = True
                    item = item_from_wire(message)
                    if not isinstance(item, Waiting):
                        yield item
                    if message.HasField("finished"):
                        await _end(messages, self._idle_s)
                        return
                    self._learn_now_and_then()
            except StopAsyncIteration:
                raise PeerUnavailable(f"{endpoint} ended the stream in the middle") from None
            except TimeoutError:
                raise PeerUnavailable(f"{endpoint} was silent for {idle_s} s") from None
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error
            except asyncio.CancelledError:
                _raise_if_ours()
                raise PeerUnavailable(f"the channel to {endpoint} was closed") from None
            finally:
                call.cancel()

    async def _ask(
        self, method: Callable[[inference_pb2_grpc.InferenceServiceAsyncStub], Awaitable[T]]
    ) -> T:
        """The answer of the first worker that gives one."""
        course = Course(self._endpoints, StreamSoFar(()), self._patience_s, time.monotonic)
        while True:
            endpoint = await self._next_worker(course, time.monotonic() + self._timeout_s)
            try:
                with self._channels.stub(endpoint) as stub:
                    return await method(stub)
            except grpc.aio.AioRpcError as error:
                course.ended(endpoint, from_rpc_error(error))

    def _learn_now_and_then(self) -> None:
        """Keeps the list of other workers fresh while streams run."""
        if time.monotonic() >= self._learn_at:
            self._start_learning()

    async def _learn(self) -> None:
        """Asks now; every caller that waits shares one round of questions."""
        await asyncio.shield(self._start_learning())

    def _start_learning(self) -> asyncio.Task[None]:
        if self._learning is None or self._learning.done():
            self._learn_at = time.monotonic() + LEARN_EVERY_S
            self._learning = asyncio.create_task(self._ask_for_peers())
        return self._learning

    async def _ask_for_peers(self) -> None:
        answers = await asyncio.gather(*map(self._peers_of, self._endpoints.known))
        told = [peers for peers in answers if peers is not None]
        if told:
            self._endpoints.learn(endpoint for peers in told for endpoint in peers)
        await self._channels.keep_only(self._endpoints.known)

    async def _peers_of(self, endpoint: str) -> list[str] | None:
        """The workers that one tells of, itself among them; None if it says nothing."""
        with self._channels.stub(endpoint) as stub:
            try:
                model = await stub.GetModel(pb.GetModelRequest(), timeout=LEARN_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                return None
        return [endpoint, *(peer.endpoint for peer in model.peers)]


def _continued(request: pb.GenerateRequest, so_far: StreamSoFar) -> pb.GenerateRequest:
    """The request as the current attempt sends it."""
    request.attempt = so_far.attempt
    started = so_far.started
    if started is not None:
        request.tokens.token_ids[:] = started.prompt_ids
        request.sampling.seed = started.seed
        if request.sampling.min_tokens <= started.max_tokens:
            request.sampling.max_tokens = started.max_tokens
        del request.resume[:]
        request.resume.extend(resume_to_wire(so_far.choices()))
    return request


async def _end(messages: AsyncIterator[pb.GenerateResponse], timeout_s: float) -> None:
    """Lets the worker end its call by itself; everything has come, however it ends."""
    with suppress(StopAsyncIteration, TimeoutError, grpc.aio.AioRpcError):
        async with asyncio.timeout(timeout_s):
            await anext(messages)


def _raise_if_ours() -> None:
    """Raises CancelledError if this task was cancelled; gRPC raises it also for its own reasons."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class RemoteEngine(BlockingClient):
    """The blocking twin of ``AsyncRemoteEngine``; same arguments."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        model: str = "",
        tenant: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        idle_s: float = DEFAULT_IDLE_S,
        patience_s: float = DEFAULT_PATIENCE_S,
    ) -> None:
        async def start() -> AsyncRemoteEngine:
            return AsyncRemoteEngine(
                endpoints,
                model=model,
                tenant=tenant,
                timeout_s=timeout_s,
                idle_s=idle_s,
                patience_s=patience_s,
            )

        loop = LoopThread("remote-engine")
        super().__init__(loop, loop.run(start()))
