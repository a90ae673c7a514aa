"""``RemoteEngine``: the client library. Same interface as ``LocalEngine``, over gRPC."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Sequence

import grpc

from engine.client import AsyncClient, BlockingClient, LoopThread
from engine.completion import StreamItem
from engine.errors import InvalidRequest
from engine.prompts import Prompt
from engine.sampling_params import SamplingParams
from engine.serving.channels import open_channel
from engine.serving.status import from_rpc_error
from engine.wire import item_from_wire, prompt_to_wire, sampling_to_wire, tokenize_to_wire
from quire.v1 import inference_pb2 as pb
from quire.v1 import inference_pb2_grpc

DEFAULT_TIMEOUT_S = 600.0


class AsyncRemoteEngine(AsyncClient):
    """Sends requests to decode services in turn. ``timeout_s`` is the deadline of each request."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        model: str = "",
        tenant: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        if not endpoints:
            raise InvalidRequest("endpoints", "there is none", "at least one host:port")
        self._model = model
        self._tenant = tenant
        self._timeout_s = timeout_s
        self._channels = [open_channel(endpoint, "control") for endpoint in endpoints]
        stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in self._channels]
        self._turns = itertools.cycle(stubs)

    async def items(
        self, prompt: Prompt, params: SamplingParams
    ) -> AsyncGenerator[StreamItem, None]:
        request = prompt_to_wire(prompt)
        request.sampling.CopyFrom(sampling_to_wire(params))
        request.model = self._model
        request.tenant = self._tenant
        call = next(self._turns).Generate(request, timeout=self._timeout_s)
        try:
            async for message in call:
                yield item_from_wire(message)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a text or conversation, as ``items`` would see them."""
        request = tokenize_to_wire(prompt)
        try:
            response = await next(self._turns).Tokenize(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return list(response.token_ids)

    async def model(self) -> pb.GetModelResponse:
        """What is served, its limits, and the other decode services of it."""
        try:
            return await next(self._turns).GetModel(pb.GetModelRequest(), timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


class RemoteEngine(BlockingClient):
    """The blocking twin of ``AsyncRemoteEngine``; same arguments."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        model: str = "",
        tenant: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        async def start() -> AsyncRemoteEngine:
            return AsyncRemoteEngine(endpoints, model=model, tenant=tenant, timeout_s=timeout_s)

        loop = LoopThread("remote-engine")
        super().__init__(loop, loop.run(start()))
