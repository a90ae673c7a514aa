"""The blocking clients: what an interrupt leaves behind."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncGenerator, Iterator

import pytest

from engine.client import AsyncClient, BlockingClient, LoopThread
from engine.completion import Started, StreamItem
from engine.prompts import Prompt
from engine.sampling_params import SamplingParams


class Interrupting(AsyncClient):
    """Sends Ctrl-C to whoever waits for the second item, and takes its time to clean up."""

    def __init__(self) -> None:
        self.cleaned_up = False

    async def items(
        self, prompt: Prompt, params: SamplingParams
    ) -> AsyncGenerator[StreamItem, None]:
        try:
            yield Started(b"", 0, (), b"")
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            for _ in range(1000):
                await asyncio.sleep(0)
            self.cleaned_up = True

    async def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Started in the background of a shell, a process ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_reaches_the_caller_when_the_request_has_been_cleaned_up() -> None:
    inner = Interrupting()
    with BlockingClient(LoopThread("test"), inner) as client:
        items = client.items("x")
        next(items)
        with pytest.raises(KeyboardInterrupt):
            next(items)
        assert inner.cleaned_up
