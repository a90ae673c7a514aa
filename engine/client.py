"""What ``LocalEngine`` and ``RemoteEngine`` share: the interface, and its blocking twin."""

from __future__ import annotations

import asyncio
import atexit
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Coroutine, Generator, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

from engine.completion import Collector, Completion, Delta, StreamItem
from engine.errors import InvalidRequest
from engine.prompts import Prompt
from engine.resume import ChoiceSoFar
from engine.sampling_params import SamplingParams

T = TypeVar("T")


class AsyncClient(ABC):
    """Generates from prompts; a place to run them is what subclasses add."""

    @abstractmethod
    def items(
        self, prompt: Prompt, params: SamplingParams, resume: Sequence[ChoiceSoFar] = ()
    ) -> AsyncGenerator[StreamItem, None]:
        """Everything one request brings, as it comes: Started, Deltas, Finished.

        ``resume`` continues an interrupted stream of the same prompt and parameters, with the seed
        it was started with: what comes is what was still to come. See ``Collector.so_far``.
        """

    @abstractmethod
    async def close(self) -> None:
        """Gives back what the client holds."""

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncGenerator[Delta, None]:
        """The new tokens of one request as they come; closing the iterator cancels it."""
        items = self.items(prompt, params or SamplingParams())
        try:
            async for item in items:
                if isinstance(item, Delta):
                    yield item
        finally:
            await items.aclose()

    async def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Runs all prompts as one batch; the completions of each prompt's choices, in order.

        Raises the first error any of them ends with; the others are cancelled then.
        """
        per_prompt = _one_each(prompts, params)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._collect(prompt, each))
                    for prompt, each in zip(prompts, per_prompt, strict=True)
                ]
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        return [completion for task in tasks for completion in task.result()]

    async def _collect(self, prompt: Prompt, params: SamplingParams) -> list[Completion]:
        collector = Collector(wants_logprobs=params.logprobs is not None)
        async for item in self.items(prompt, params):
            collector.add(item)
        return collector.completions()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


def _one_each(
    prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> Sequence[SamplingParams]:
    if isinstance(prompts, str):
        raise InvalidRequest("prompts", "it is one text", "a list of prompts")
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise InvalidRequest(
            "params", f"{len(params)} for {len(prompts)} prompts", "one, or one per prompt"
        )
    return params


class LoopThread:
    """An event loop on a thread of its own, for callers that have none."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs ``work`` to its end; an interrupt cancels it, and that end is waited for too.

        Otherwise whoever handles the interrupt would meet ``work`` still using what it used.
        """
        # Not a Future: waiting for that, an interrupt can leave its lock in pieces.
        ended: SimpleQueue[asyncio.Task[T] | None] = SimpleQueue()
        tasks: list[asyncio.Task[T]] = []

        def start() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(ended.put)

        def stop() -> None:
            if tasks:
                tasks[0].cancel()
                tasks[0].add_done_callback(ended.put)  # The first word may have been taken.
            else:  # Interrupted before start was handed over: it never comes.
                work.close()
                ended.put(None)

        # An interrupt can fall between any two instructions, so nothing starts outside the try.
        try:
            self._loop.call_soon_threadsafe(start)
            task = ended.get()
            assert task is not None
            return task.result()
        except BaseException:
            self._loop.call_soon_threadsafe(stop)
            ended.get()
            raise

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


class BlockingClient:
    """The blocking twin of an ``AsyncClient``; use as a context manager or call ``close``."""

    def __init__(self, loop: LoopThread, client: AsyncClient) -> None:
        self._loop = loop
        self._client = client
        self._closed = False
        # A program that closes nothing must still end: later nobody runs the loop any more.
        atexit.register(self.close)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """As ``AsyncClient.generate``."""
        return self._loop.run(self._client.generate(prompts, params))

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[Delta, None, None]:
        """As ``AsyncClient.stream``."""
        return self._each(self._client.stream(prompt, params))

    def items(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        resume: Sequence[ChoiceSoFar] = (),
    ) -> Generator[StreamItem, None, None]:
        """As ``AsyncClient.items``."""
        return self._each(self._client.items(prompt, params or SamplingParams(), resume))

    def _each(self, items: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        try:
            while True:
                try:
                    yield self._loop.run(_next(items))
                except StopAsyncIteration:
                    return
        finally:
            if not self._closed:
                self._loop.run(items.aclose())

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            atexit.unregister(self.close)
            self._loop.run(self._client.close())
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


async def _next(items: AsyncGenerator[T, None]) -> T:
    return await anext(items)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
