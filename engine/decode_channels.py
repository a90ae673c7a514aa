"""One channel to each decode service, opened when needed, closed when neither known nor used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import grpc

from engine.serving.channels import open_channel
from quire.v1 import inference_pb2_grpc


class DecodeChannels:
    """The channels of one client."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._num_users: Counter[str] = Counter()
        self.closed = False

    @contextmanager
    def stub(self, endpoint: str) -> Iterator[inference_pb2_grpc.InferenceServiceAsyncStub]:
        """Calls to ``endpoint``; the channel stays open at least until the block ends."""
        if endpoint not in self._channels:
            self._channels[endpoint] = open_channel(endpoint, "control")
        self._num_users[endpoint] += 1
        try:
            yield inference_pb2_grpc.InferenceServiceStub(self._channels[endpoint])
        finally:
            self._num_users[endpoint] -= 1

    async def keep_only(self, endpoints: Collection[str]) -> None:
        """Closes what goes elsewhere and carries no call."""
        for endpoint in self._channels.keys() - {*endpoints}:
            if not self._num_users[endpoint]:
                await self._channels.pop(endpoint).close()

    async def close(self) -> None:
        """Calls in progress are cancelled."""
        self.closed = True
        for channel in self._channels.values():
            await channel.close()
