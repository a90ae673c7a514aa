"""The blocking clients: what an interrupt leaves behind."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from types import FrameType

import pytest

from engine.client import AsyncClient, BlockingClient, LoopThread
from engine.completion import Started, StreamItem
from engine.prompts import Prompt
from engine.resume import ChoiceSoFar
from engine.sampling_params import SamplingParams


class Interrupting(AsyncClient):
    """Sends Ctrl-C to whoever waits for the second item, and takes its time to clean up."""

    def __init__(self) -> None:
        self.cleaned_up = False

    async def items(
        self, prompt: Prompt, params: SamplingParams, resume: Sequence[ChoiceSoFar] = ()
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


class Counting(AsyncClient):
    """Three items, and whether what made them is still at it."""

    def __init__(self) -> None:
        self.running = 0

    async def items(
        self, prompt: Prompt, params: SamplingParams, resume: Sequence[ChoiceSoFar] = ()
    ) -> AsyncGenerator[StreamItem, None]:
        self.running += 1
        try:
            for _ in range(3):
                await asyncio.sleep(0)
                yield Started(b"", 0, (), b"")
        finally:
            try:
                await asyncio.sleep(0)
            finally:  # cancelled here, it has ended all the same
                self.running -= 1

    async def close(self) -> None:
        pass


class InterruptAt:
    """Raises KeyboardInterrupt before one instruction of ``LoopThread.run`` or what it calls."""

    def __init__(self, instruction: int) -> None:
        self.left = instruction

    def __call__(self, frame: FrameType, event: str, _: object) -> InterruptAt | None:
        if event == "call":
            caller = frame.f_back
            waits = frame.f_code is LoopThread.run.__code__
            if not waits and (caller is None or caller.f_trace is not self):
                return None
            frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_instruction_of_a_wait_leaves_nothing_running() -> None:
    inner = Counting()
    interrupted = 0
    with BlockingClient(LoopThread("test"), inner) as client:
        while True:
            interrupt = InterruptAt(interrupted + 1)
            items = client.items("x")
            before = sys.gettrace()
            sys.settrace(interrupt)
            try:
                for _ in items:
                    pass
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                sys.settrace(before)
            patience = time.monotonic() + 10
            while inner.running and time.monotonic() < patience:
                time.sleep(0.001)
            assert not inner.running, f"interrupted at instruction {interrupted}"
            if interrupt.left > 0:
                break
        assert len(list(client.items("x"))) == 3
    assert interrupted > 200
