"""The oracle: what one undisturbed engine gives for a request."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from engine.completion import StreamItem
from engine.local import AsyncLocalEngine
from engine.sampling_params import SamplingParams
from tests.faults.history import Prompt, Reference


class Truth:
    """What one undisturbed engine gives; asked once for each request."""

    def __init__(self, engine: AsyncLocalEngine) -> None:
        self._engine = engine
        self._known: dict[tuple[Prompt, str], dict[int, tuple[int, ...]]] = {}

    async def tokens(self, prompt: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        """Of the first choice."""
        return (await self.choices(prompt, params))[0]

    async def choices(
        self, prompt: Sequence[int], params: SamplingParams
    ) -> Mapping[int, tuple[int, ...]]:
        key = (tuple(prompt), repr(params))
        if key not in self._known:
            found = await self._engine.generate([prompt], params)
            self._known[key] = {each.choice_index: each.token_ids for each in found}
        return self._known[key]

    async def items(self, prompt: Sequence[int], params: SamplingParams) -> list[StreamItem]:
        """All that its caller is told."""
        return [item async for item in self._engine.items(prompt, params)]

    async def of(self, requests: Sequence[tuple[Prompt, SamplingParams]]) -> Reference:
        """For the checker of histories."""
        await asyncio.gather(*[self.choices(prompt, params) for prompt, params in requests])
        return lambda prompt, params: self._known[prompt, repr(params)]
